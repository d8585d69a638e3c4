"""Films of states on their way from noise to data: GIF by Pillow, MP4 by PyAV (an extra)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sdeflow.errors import ArgumentError, PluginError
from sdeflow.sample import Solution
from sdeflow.sde import GaussianSDE

from ..pictures import is_image, scatter, tile

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".gif", ".mp4")
FRAMES, REST = 60, 2.0
"""At most so many frames of the way, and the seconds that the last one stays."""


def check_film(path: str | Path, shape: Sequence[int] | None = None) -> Path:
    """`path` if it can be a film's, of states of that shape; otherwise an error."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ArgumentError(f"film={str(path)!r} must end in .gif, or .mp4 with sdeflow[video]")
    if path.suffix.lower() == ".mp4":
        _av()
    if shape is not None and not is_image(shape) and tuple(shape) != (2,):
        raise ArgumentError(
            f"film={str(path)!r}: states of shape {tuple(shape)} have no picture; images and "
            "points in the plane have"
        )
    return path


def film_of(run: Solution, sde: GaussianSDE) -> list[Tensor]:
    """The states to show of a run with its path, 60 at most: x/sqrt(alpha^2 + sigma^2), which
    keeps the noise of every SDE at the size of the data."""
    if run.path is None:
        raise ArgumentError("the run kept no path; make it with keep=True")
    n = len(run.ts)
    shown = torch.linspace(0, n - 1, min(n, FRAMES)).round().long().tolist()
    scale = torch.sqrt(sde.alpha(run.ts) ** 2 + sde.sigma(run.ts) ** 2)
    return [run.path[k].cpu() / scale[k].to(run.path.dtype) for k in shown]


def save_film(
    frames: Sequence[Tensor],
    path: str | Path,
    *,
    columns: int = 8,
    ink: bool = False,
    fps: float = 12.5,
    rows: Sequence[str] = (),
) -> Path:
    """Write states, (B, C, H, W) or (B, 2), as a .gif or .mp4 that rests on the last one.

    columns: of images. rows: their names; of points, equal parts have a colour each.
    """
    if not len(frames):
        raise ArgumentError("frames is empty; a film needs at least one state")
    path = check_film(path, frames[0].shape[1:])
    path.parent.mkdir(parents=True, exist_ok=True)
    images = _images(frames, columns, ink, rows)
    if path.suffix.lower() == ".mp4":
        _save_mp4(images, path, fps)
    else:
        _save_gif(list(images), path, fps)
    return path


def _images(
    frames: Sequence[Tensor], columns: int, ink: bool, rows: Sequence[str]
) -> Iterator[Image.Image]:
    for x in frames:
        if is_image(x.shape[1:]):
            yield tile(x, columns, size=48, gap=8, ink=ink, rows=rows)
        else:
            yield scatter(x, rows)


def _save_gif(images: list[Image.Image], path: Path, fps: float) -> None:
    from PIL import Image

    grey = images[-1].convert("L").convert("RGB") == images[-1]
    kept = [image.convert("L") if grey else image for image in images]
    method = Image.Quantize.MEDIANCUT
    reduced = [image.quantize(16 if grey else 128, method) for image in kept]
    waits = [round(1000 / fps)] * (len(reduced) - 1) + [round(1000 * REST)]
    reduced[0].save(path, save_all=True, append_images=reduced[1:], duration=waits, loop=0)


def _save_mp4(images: Iterator[Image.Image], path: Path, fps: float) -> None:
    """H.264 in 4:2:0, which every player knows; sides are made even, as it asks."""
    from fractions import Fraction

    av = _av()
    rate = Fraction(fps).limit_denominator(1000)
    with av.open(str(path), "w") as container:
        stream, last = None, None
        for image in images:
            last = np.asarray(image)[: image.height // 2 * 2, : image.width // 2 * 2]
            if stream is None:
                stream = container.add_stream("libx264", rate=rate)
                stream.height, stream.width = last.shape[:2]
                stream.pix_fmt, stream.options = "yuv420p", {"crf": "18"}
            container.mux(stream.encode(av.VideoFrame.from_ndarray(last, format="rgb24")))
        assert stream is not None and last is not None
        for _ in range(round(REST * fps)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(last, format="rgb24")))
        container.mux(stream.encode())


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise PluginError(
            f"an .mp4 film needs PyAV ({error}); pip install 'sdeflow[video]', or write a .gif"
        ) from error
    return av
