"""A folder of images, read with Pillow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sdeflow.errors import ArgumentError, one_of, positive_int
from sdeflow.plugins import Factory, hookimpl

from . import checked_split

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
MODES = {"rgb": "RGB", "grey": "L"}


class Folder(Dataset[Tensor]):
    """A folder of images, searched at every depth; resized, cropped at the centre, in [-1, 1].

    Args:
        split: "train" or "test": every tenth file in order of name is held out as "test". Where
            there are two subfolders `train` and `test`, these are the splits.
        path: the folder.
        size: the side of the square images, in pixels.
        color: "rgb" (3, size, size) or "grey" (1, size, size).
        flip: whether the mirror image of every training image is a sample too.
    """

    def __init__(
        self,
        split: str = "train",
        path: str = "",
        size: int = 32,
        color: Literal["rgb", "grey"] = "rgb",
        flip: bool = True,
    ) -> None:
        checked_split(split)
        self.size = positive_int("size", size)
        self.mode = MODES[one_of("color", color, MODES)]
        self.files = _files(path, split)
        self.flip = flip and split == "train"
        self.shape = (3 if color == "rgb" else 1, self.size, self.size)

    def __len__(self) -> int:
        return len(self.files) * (2 if self.flip else 1)

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"index={index} must be in 0..{len(self) - 1}")
        mirrored, index = divmod(index, len(self.files))
        pixels = np.asarray(self._read(self.files[index]), dtype=np.float32) / 127.5 - 1
        x = torch.from_numpy(pixels.reshape(self.size, self.size, -1)).movedim(2, 0)
        return (x.flip(2) if mirrored else x).contiguous()

    def _read(self, file: Path) -> Image.Image:
        """The image, turned upright, its shorter side at `size`, the middle square of it."""
        from PIL import Image, ImageOps

        try:
            with Image.open(file) as image:
                upright = ImageOps.exif_transpose(image).convert(self.mode)
                return ImageOps.fit(upright, (self.size, self.size), Image.Resampling.LANCZOS)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ArgumentError(
                f"path: {file} cannot be read as an image ({type(error).__name__}: {error}); "
                "remove or replace the file"
            ) from error


def _files(path: str, split: str) -> list[Path]:
    """The image files of a split, in order of name."""
    root = Path(path).expanduser()
    if not path or not root.is_dir():
        raise ArgumentError(
            f"path={path!r} must be a folder of images, such as --data_options.path ~/pictures"
        )
    divided = (root / "train").is_dir() and (root / "test").is_dir()
    found = _images(root / split if divided else root)
    if not divided:
        found = [file for k, file in enumerate(found) if (k % 10 == 9) == (split == "test")]
    if not found:
        endings = " ".join(sorted(SUFFIXES))
        raise ArgumentError(
            f"path={path!r} holds no image for split={split!r}; put at least 10 files there with "
            f"one of the endings {endings}, or subfolders train and test"
        )
    return found


def _images(root: Path) -> list[Path]:
    return sorted(f for f in root.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())


@hookimpl
def sdeflow_datasets() -> Mapping[str, Factory]:
    return {"folder": Folder}
