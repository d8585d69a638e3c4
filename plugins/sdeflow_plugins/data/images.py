"""Images of any size and mode as samples of one shape: what every data set of pictures shares.

`Frame` says how a picture becomes a sample, `ImageData` which sample is which picture, and a
`Source` where the pictures are: files of a folder, members of a tar, rows of a table.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import IO, TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from sdeflow.errors import ArgumentError, PluginError, one_of, positive_int, whole

from . import Data, checked_split

if TYPE_CHECKING:
    from PIL import Image

Color = Literal["rgb", "grey"]
Crop = Literal["center", "random"]
Broken = Literal["refuse", "skip"]

CHANNELS = {"rgb": 3, "grey": 1}
PLACES = 4
"""Random crops of a picture, where it is not said how many."""
SMALLEST = 0.8
"""Side of the smallest random crop, as a share of the shorter side of the picture."""


@dataclass(frozen=True)
class Frame:
    """How a picture becomes samples: a square cut out of it, resized (Lanczos), in [-1, 1].

    A random crop is a square whose side is 0.8 to 1 times the picture's shorter side, anywhere in
    it (Dhariwal & Nichol 2021). Its place is a function of the picture's number and the number of
    the view, so that a sample is the same whenever it is read.

    size: the side of the sample in pixels. color: "rgb" (3 channels) or "grey" (1).
    crops: squares cut out of a picture, each a sample; 0 takes the one in the middle.
    flip: whether the mirror image of each is a sample too.
    """

    size: int
    color: str
    crops: int
    flip: bool

    @classmethod
    def of(cls, split: str, size: int, color: str, crop: str, crops: int, flip: bool) -> Frame:
        """The frame of a split; test pictures are neither moved nor mirrored."""
        test = checked_split(split) == "test"
        one_of("crop", crop, ("center", "random"))
        positive_int("size", size)
        if whole(crops) is None or crops < 0 or (crops and crop == "center"):
            raise ArgumentError(f"crops={crops!r} must be a whole number >= 1, with crop=random")
        one_of("color", color, CHANNELS)
        if find_spec("PIL") is None:
            raise PluginError("images are read with Pillow; pip install 'sdeflow[images]'")
        places = 0 if test or crop == "center" else crops or PLACES
        return cls(size, color, places, flip and not test)

    @property
    def shape(self) -> tuple[int, int, int]:
        """That of a sample."""
        return CHANNELS[self.color], self.size, self.size

    @property
    def views(self) -> int:
        """Samples made of one picture."""
        return max(1, self.crops) * (2 if self.flip else 1)

    def cut(self, image: Image.Image, number: int, view: int) -> Tensor:
        """View `view` of picture `number`; `image` is as `decode` returns it."""
        from PIL.Image import Resampling

        place, mirrored = divmod(view, 2) if self.flip else (view, 0)
        share, across, down = 1.0, 0.5, 0.5
        if self.crops:
            share, across, down = np.random.default_rng([number, place]).random(3)
            share = SMALLEST + (1 - SMALLEST) * share
        side = share * min(image.size)
        left, top = across * (image.width - side), down * (image.height - side)
        square = (left, top, left + side, top + side)
        small = image.resize((self.size, self.size), Resampling.LANCZOS, square)
        pixels = np.asarray(small, np.float32).reshape(self.size, self.size, -1)
        x = torch.from_numpy(pixels.clip(0, 255) / 127.5 - 1).movedim(2, 0)
        return (x.flip(2) if mirrored else x).expand(self.shape).contiguous()


def decode(file: str | IO[bytes], frame: Frame) -> Image.Image:
    """A picture upright, in RGB or grey; 16-bit grey in floats 0 to 255.

    What is transparent lies on white; of an animation it is the first picture; colour profiles are
    not applied. A large JPEG is decoded at a half, quarter or eighth of its size where that is
    still three times the sample's.
    """
    from PIL import Image, ImageOps

    with Image.open(file) as image:
        image.draft(image.mode, (3 * frame.size, 3 * frame.size))
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # Pillow would clip 16-bit levels to 255, all of it white
            levels = np.asarray(upright).astype(np.float32)
            if levels.min() < 0 or levels.max() > 65535:
                raise ValueError(f"levels {levels.min():g}..{levels.max():g} are not in 0..65535")
            return Image.fromarray(levels / 257)
        if upright.mode == "F":
            raise ValueError("floats have no agreed white; use the data set arrays")
        if upright.has_transparency_data:
            above = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
        return upright.convert("RGB" if frame.color == "rgb" else "L")


class Source(Protocol):
    """Pictures by number. It holds no open file, so that worker processes may copy it."""

    def __len__(self) -> int: ...

    def name(self, k: int) -> str:
        """What an error calls picture k."""

    def file(self, k: int) -> str | IO[bytes]:
        """Where picture k is: a path, or its bytes."""


class ImageData(Data):
    """Pictures of a source, read one at a time; with v views of each, v times as many samples.

    Sample v n + k is view v of picture k. A picture shows that it is broken when it is decoded and
    no sooner: Pillow's `verify`, 0.02 s for 1,000 files, passes a JPEG that is cut in half. To
    decode all of them first would take as long as an epoch: 0.7 s for 1,000 JPEG of 178 x 218 and
    3 s for 1,000 of 500 x 375, at size 64 on one core. So it is found when it is first read, and
    then
    - broken="refuse" raises an error that names it;
    - broken="skip" puts the next readable picture of the same class, in order, in its place, for
      good, with a warning that names both. A file that cannot be opened at all (gone, forbidden)
      is an error even so: it says more of the disk than of the picture.
    """

    def __init__(
        self,
        source: Source,
        frame: Frame,
        labels: Tensor | None = None,
        class_names: Sequence[str] = (),
        classes: int = 0,
        broken: str = "refuse",
    ) -> None:
        self.source, self.frame = source, frame
        self.skip = one_of("broken", broken, ("refuse", "skip")) == "skip"
        self.stand_ins: dict[int, int] = {}
        views = labels.repeat(frame.views) if labels is not None else None
        super().__init__(len(source) * frame.views, frame.shape, views, class_names, classes)

    def sample(self, k: int) -> Tensor:
        view, number = divmod(k, len(self.source))
        number = self.stand_ins.get(number, number)
        try:
            image = self.decoded(number)
        except ArgumentError as error:
            if not self.skip:
                raise ArgumentError(f"{error}, or read past it with broken=skip") from error
            self.stand_ins[number], image = self._next_readable(number, error)
            number = self.stand_ins[number]
        return self.frame.cut(image, number, view)

    def decoded(self, number: int) -> Image.Image:
        """Picture `number`, upright; ArgumentError where it is broken."""
        try:
            return decode(self.source.file(number), self.frame)
        except Exception as error:  # Pillow's readers raise whatever a broken file makes them
            if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno):
                raise
            raise ArgumentError(
                f"{self.source.name(number)} cannot be read as an image "
                f"({type(error).__name__}: {error}); remove or replace it"
            ) from error

    def _next_readable(self, number: int, error: ArgumentError) -> tuple[int, Image.Image]:
        """The picture that stands in for a broken one, and its number."""
        n = len(self.source)
        alike = torch.arange(n)
        if self.labels is not None:
            alike = alike[self.labels[:n] == self.labels[number]]
        for other in torch.cat((alike[alike > number], alike[alike < number])).tolist():
            try:
                image = self.decoded(other)
            except ArgumentError:
                continue
            warnings.warn(f"{error}; {self.source.name(other)} stands in for it", stacklevel=4)
            return other, image
        raise ArgumentError(f"{error}; none of its class can be read ({len(alike)})") from error
