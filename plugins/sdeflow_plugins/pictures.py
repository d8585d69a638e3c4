"""Pictures of samples: grids of images, clouds of points, the loss curve, a film."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sdeflow.errors import ArgumentError, ShapeError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

    from .train.loop import Record

GREY = "#6b7280"
COLORS = ("#d1495b", "#edae49", "#00798c", "#66a182", "#2e4057", "#8d5a97")


def is_image(shape: Sequence[int]) -> bool:
    """Whether one sample of that shape is a picture: (1 or 3, H, W)."""
    return len(shape) == 3 and shape[0] in (1, 3)


def pixels(x: Tensor, ink: bool = False) -> np.ndarray:
    """Images (B, C, H, W) in [-1, 1] as bytes (B, H, W, 3); with `ink`, 1 is drawn dark."""
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ShapeError(f"x has shape {tuple(x.shape)}; images are (B, 1 or 3, H, W)")
    x = (-x if ink else x).float().clamp(-1, 1)
    grey = ((x + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)
    return grey.permute(0, 2, 3, 1).cpu().numpy()


def tile(
    x: Tensor, columns: int = 8, *, size: int = 56, gap: int = 10, ink: bool = False
) -> Image.Image:
    """Images (B, C, H, W) side by side on white; each at least `size` pixels wide, enlarged
    smoothly."""
    from PIL import Image

    images = pixels(x, ink)
    scale = max(1, -(-size // images.shape[2]))
    height, width = images.shape[1] * scale + gap, images.shape[2] * scale + gap
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    for k, image in enumerate(images):
        large = Image.fromarray(image).resize((width - gap, height - gap), Image.Resampling.BICUBIC)
        sheet.paste(large, (gap + k % columns * width, gap + k // columns * height))
    return sheet


def save_samples(x: Tensor, path: Path, *, ink: bool = False) -> Path:
    """Write samples as one PNG: images as a grid, points in the plane as a scatter plot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_image(x.shape[1:]):
        tile(x, columns=min(16, max(1, round(len(x) ** 0.5))), ink=ink).save(path)
    elif x.shape[1:] == (2,):
        figure, axes = new_figure(4, 4)
        axes.scatter(*x.cpu().T.numpy(), s=4, color=COLORS[2], linewidths=0)
        axes.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal", xticks=[], yticks=[])
        finish(figure, path)
    else:
        raise ArgumentError(
            f"samples of shape {tuple(x.shape[1:])} have no picture; write them with --save npy"
        )
    return path


def loss_curve(records: Sequence[Record], path: Path) -> None:
    """Write the loss against the step."""
    figure, axes = new_figure(6, 3.4)
    steps, losses = [r.step for r in records], [r.loss for r in records]
    axes.plot(steps, losses, color=COLORS[2], linewidth=1.6)
    if losses and min(losses) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(which="both", labelsize=8)
    axes.set(xlabel="step", ylabel="score matching loss")
    finish(figure, path)


def film(frames: Iterable[Tensor], path: Path, *, columns: int = 8, ink: bool = False) -> None:
    """Write states (B, C, H, W) as a GIF that rests on the last one."""
    images = [tile(x, columns, size=48, gap=8, ink=ink).convert("L").quantize(16) for x in frames]
    if not images:
        raise ArgumentError("frames is empty; a film needs at least one state")
    waits = [80] * (len(images) - 1) + [2500]
    images[0].save(path, save_all=True, append_images=images[1:], duration=waits, loop=0)


def new_figure(width: float, height: float) -> tuple[Figure, Any]:
    """(figure, axes) of that size in inches, drawn without a display; no global state of pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def finish(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white")
