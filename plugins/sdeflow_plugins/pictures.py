"""Pictures of samples: grids of images, clouds of points, the loss curve."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
TEXT = 14
"""The size of names in grids, in pixels."""


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
    x: Tensor,
    columns: int = 8,
    *,
    size: int = 56,
    gap: int = 10,
    ink: bool = False,
    rows: Sequence[str] = (),
    tops: Sequence[str] = (),
) -> Image.Image:
    """Images (B, C, H, W) side by side on white; each at least `size` pixels wide, enlarged
    smoothly.

    rows, tops: what stands beside the rows, and above the columns.
    """
    from PIL import Image

    images = pixels(x, ink)
    scale = max(1, -(-size // images.shape[2]))
    height, width = images.shape[1] * scale + gap, images.shape[2] * scale + gap
    columns = min(columns, len(images))
    lines = -(-len(images) // columns)
    left, top = _margin(rows, gap), (TEXT + gap if any(tops) else 0)
    sheet = Image.new("RGB", (left + columns * width + gap, top + lines * height + gap), "white")
    for k, image in enumerate(images):
        large = Image.fromarray(image).resize((width - gap, height - gap), Image.Resampling.BICUBIC)
        sheet.paste(large, (left + gap + k % columns * width, top + gap + k // columns * height))
    middle = (gap + height) / 2
    beside = [(left, top + k * height + middle, name) for k, name in enumerate(rows)]
    above = [(left + k * width + (gap + width) / 2, top - 2, name) for k, name in enumerate(tops)]
    _write(sheet, beside, "rm")
    _write(sheet, above, "ms")
    return sheet


def _margin(names: Sequence[str], gap: int) -> int:
    """The room that names take on the left."""
    return max((round(_font().getlength(name)) + gap for name in names if name), default=0)


def _font() -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(TEXT)


def _write(
    sheet: Image.Image, names: Iterable[tuple[float, float, str]], anchor: Literal["rm", "ms"]
) -> None:
    from PIL import ImageDraw

    draw, font = ImageDraw.Draw(sheet), _font()
    for x, y, name in names:
        draw.text((x, y), name, fill="black", font=font, anchor=anchor)


def scatter(x: Tensor, groups: Sequence[str] = (), size: float = 4) -> Image.Image:
    """Points (B, 2) of the square [-1.1, 1.1]^2; `groups` names equal parts of them, in order,
    which then have a colour each."""
    from PIL import Image

    figure, axes = new_figure(size, size)
    names = list(groups) or [""]
    for k, part in enumerate(x.detach().cpu().chunk(len(names))):
        color = COLORS[(2 + k) % len(COLORS)]
        axes.scatter(*part.T.numpy(), s=4, color=color, linewidths=0, label=names[k])
    axes.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal", xticks=[], yticks=[])
    if groups:
        axes.legend(markerscale=3, fontsize=8, frameon=False, loc="upper right")
    file = BytesIO()
    figure.savefig(file, dpi=150, facecolor="white", format="png")
    return Image.open(file).convert("RGB")


def save_samples(
    x: Tensor,
    path: Path,
    *,
    ink: bool = False,
    columns: int = 0,
    rows: Sequence[str] = (),
    tops: Sequence[str] = (),
) -> Path:
    """Write samples as one PNG: images as a grid, points in the plane as a scatter plot.

    columns: of the grid; 0 makes it about square. rows, tops: what its rows and columns are called;
    of points, each row has a colour.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_image(x.shape[1:]):
        columns = columns or min(16, max(1, round(len(x) ** 0.5)))
        tile(x, columns, ink=ink, rows=rows, tops=tops).save(path)
    elif x.shape[1:] == (2,):
        scatter(x, rows).save(path)
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
