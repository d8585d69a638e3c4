"""Image to image: noise is added up to a time in between, and taken away again.

Source: Meng et al. (2022, SDEdit).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdeflow.errors import ArgumentError
from sdeflow.noise import Seed, fresh_seed, start
from sdeflow.reverse import ReverseSDE
from sdeflow.sample import Solution, integrate, make_grid
from sdeflow.solver import Solver

from ..data.folder import SUFFIXES
from ..pictures import is_image


def edit(
    process: ReverseSDE,
    x0: Tensor,
    strength: float,
    *,
    solver: Solver | str = "dpmpp_2m",
    steps: int = 20,
    grid: str | Callable[..., Tensor] | Tensor = "log_snr",
    seed: Seed | None = None,
    keep: bool = False,
    progress: bool = False,
) -> Solution:
    """x0 perturbed to t = strength T, and sampled from there: near x0, and like the data.

    process: reverse(sde, score) or probability_flow(sde, score) of a Gaussian SDE.
    x0: the states to begin from, (B, *). strength: in [0, 1]. 0 gives x0 back, as does a time
    below the grid's last one; 1 begins from noise alone, as `sample` does with the same seed.
    steps, grid: of the whole way from T; the steps after strength T are taken.
    """
    if not isinstance(strength, float | int) or not 0 <= strength <= 1:
        raise ArgumentError(
            f"strength={strength!r} must be in [0, 1]: 0 gives the image back, 1 is from noise"
        )
    seed = fresh_seed() if seed is None else seed
    ts = make_grid(process, grid, steps)
    sde, z = process.gaussian, start(seed, x0.shape, x0.dtype, x0.device)
    if strength == 1:
        x = sde.prior(z, ts[0])
    else:
        first = torch.tensor(strength * sde.T, dtype=torch.float64)
        ts = torch.cat((first.reshape(1), ts[ts < first]))
        if len(ts) == 1:
            return Solution(x0, ts, 0, seed, False, x0[None] if keep else None)
        x = sde.perturb(x0, first, z)
    return integrate(process, x, ts, solver, seed=seed, keep=keep, progress=progress)


def load_images(path: str, shape: tuple[int, ...], ink: bool = False) -> tuple[Tensor, list[str]]:
    """The image in a file, or all of a folder in order of name, as states; and their names.

    Each is turned upright, resized and cropped at the centre to the (C, H, W) of `shape`, in
    [-1, 1]. ink: 1 is dark.
    """
    if not is_image(shape):
        raise ArgumentError(f"image={path!r}: this run makes states of shape {shape}, no images")
    root = Path(path).expanduser()
    files = [root]
    if root.is_dir():
        files = sorted(f for f in root.iterdir() if f.suffix.lower() in SUFFIXES and f.is_file())
    if not files or not files[0].is_file():
        what = "holds no image" if root.is_dir() else "is no file"
        endings = " ".join(sorted(SUFFIXES))
        raise ArgumentError(f"image={path!r} {what}; give an image, or a folder of them: {endings}")
    return torch.stack([_read(file, shape, ink) for file in files]), [file.stem for file in files]


def _read(file: Path, shape: tuple[int, ...], ink: bool) -> Tensor:
    from PIL import Image, ImageOps

    channels, height, width = shape
    try:
        with Image.open(file) as image:
            upright: Any = ImageOps.exif_transpose(image)
            if "A" in upright.getbands() or "transparency" in upright.info:  # shown on white
                upright = upright.convert("RGBA")
                white = Image.new("RGBA", upright.size, "white")
                upright = Image.alpha_composite(white, upright)
            upright = upright.convert("RGB" if channels == 3 else "L")
            fitted = ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ArgumentError(
            f"image: {file} cannot be read as an image ({type(error).__name__}: {error})"
        ) from error
    levels = np.asarray(fitted, dtype=np.float32).reshape(height, width, channels) / 127.5 - 1
    x = torch.from_numpy(levels).movedim(2, 0).contiguous()
    return -x if ink else x
