"""Pictures of a comparison and of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..pictures import COLORS, GREY, finish, is_image, new_figure, save_samples, tile
from .bootstrap import Estimate
from .compare import Cell, flat
from .memorisation import Nearest
from .panel import METRICS
from .real import take
from .report import number

MARKERS = "osD^vPX*"

# ---- a comparison


def draw_distances(
    cells: Sequence[Cell], path: Path, metric: str, floor: Estimate | None = None
) -> None:
    """Write the curves of a metric against evaluations, with error bars.

    Both axes are logarithmic for a distance. floor: what real data reach, a horizontal band. Of
    distances, those beyond 50 times the best leave the picture.
    """
    from matplotlib.ticker import LogLocator

    figure, axes = new_figure(6.4, 4)
    for k, label in enumerate(dict.fromkeys(cell.sampler for cell in cells)):
        row = [c for c in cells if c.sampler == label and math.isfinite(c.value(metric))]
        axes.errorbar(
            [c.evaluations for c in row],
            [c.value(metric) for c in row],
            yerr=[c.metrics[metric].error for c in row],
            marker=MARKERS[k // len(COLORS) % len(MARKERS)],
            markersize=4,
            capsize=2,
            linewidth=1.4,
            color=COLORS[k % len(COLORS)],
            label=flat(label),
        )
    if floor is not None and math.isfinite(floor.value):
        axes.axhline(floor.value, color=GREY, linestyle="--", linewidth=1, label="real data")
    axes.set(xscale="log", xlabel="evaluations of the network", ylabel=METRICS[metric].label)
    values = [c.value(metric) for c in cells if math.isfinite(c.value(metric))]
    values += [floor.value] if floor is not None else []
    if METRICS[metric].better == "low" and min(values, default=0) > 0:
        axes.set_yscale("log")
        axes.set_ylim(0.8 * min(values), 1.2 * min(50 * min(values), max(values)))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    budgets = sorted({cell.budget for cell in cells})
    axes.set_xticks(budgets, [str(b) for b in budgets])
    axes.set_xticks([], minor=True)
    axes.legend(frameon=False, fontsize=8)
    finish(figure, path)


def draw_samples(
    rows: Sequence[tuple[Cell, Tensor | None]],
    path: Path,
    metric: str,
    ink: bool = False,
    shown: int = 10,
) -> None:
    """Write one picture: a row for each sampler, a column for each budget, the same seeds in all.

    Below each cell stand the evaluations that were made and the metric.
    """
    labels = list(dict.fromkeys(cell.sampler for cell, _ in rows))
    budgets = sorted({cell.budget for cell, _ in rows})
    figure, whole = new_figure(2.5 * len(budgets) + 1.2, 1.2 * len(labels) + 0.3)
    whole.remove()
    axes = figure.subplots(len(labels), len(budgets), squeeze=False)
    for place in axes.flat:
        place.set(xticks=[], yticks=[])
        place.spines[:].set_visible(False)
    for column, budget in enumerate(budgets):
        axes[0, column].set_title(f"{budget} evaluations", fontsize=11, color="#111827")
    for line, label in enumerate(labels):
        axes[line, 0].set_ylabel(
            label, rotation=0, ha="right", va="center", labelpad=8, fontsize=11, color="#111827"
        )
    word = METRICS[metric].label.split()[-1].lower()
    sheets = [sheet for _, x in rows if (sheet := _sheet(x, shown, ink)) is not None]
    for place in axes.flat:  # an empty one takes the room of a picture, so that names stand in line
        place.set_box_aspect(sheets[0].height / sheets[0].width if sheets else 1)
    for cell, x in rows:
        place = axes[labels.index(cell.sampler), budgets.index(cell.budget)]
        if x is None:
            place.text(0.5, 0.5, "diverged", ha="center", va="center", color=GREY)
        elif (sheet := _sheet(x, shown, ink)) is not None:
            place.imshow(sheet)
        elif x.shape[1:] == (2,):
            place.scatter(*x.T.numpy(), s=1, color=COLORS[2], linewidths=0)
            place.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1))
        made = f"{cell.evaluations} evaluations, " if cell.evaluations != cell.budget else ""
        said = number(cell.metrics[metric]) if metric in cell.metrics else "-"
        place.set_xlabel(f"{made}{word} {said}", fontsize=8, color=GREY)
    finish(figure, path)


def _sheet(x: Tensor | None, shown: int, ink: bool) -> Any:
    """Images in two rows; None of what is no images."""
    if x is None or not is_image(x.shape[1:]):
        return None
    return tile(x[:shown], -(-shown // 2), ink=ink)


# ---- an evaluation


def draw_classes(
    x: Tensor,
    labels: Tensor,
    name: Callable[[int], str],
    path: Path,
    ink: bool = False,
    rows: int = 10,
    most: int = 20,
) -> None:
    """Write a sheet of samples, a column for each class that was asked for, its name above."""
    classes = labels.unique().tolist()[:most]
    columns = [x[labels == k][:rows] for k in classes]
    height = min(map(len, columns))
    sheet = torch.stack([column[line] for line in range(height) for column in columns])
    names = [name(k) for k in classes]
    save_samples(sheet, path, ink=ink, columns=len(columns), tops=names)


def draw_points(x: Tensor, labels: Tensor | None, name: Callable[[int], str], path: Path) -> None:
    """Write points in the plane, a colour for each class that was asked for."""
    classes = [] if labels is None else labels.unique().tolist()
    parts = [x[labels == k] for k in classes] or [x]
    each = min(map(len, parts))
    save_samples(torch.cat([part[:each] for part in parts]), path, rows=[name(k) for k in classes])


def draw_nearest(
    x: Tensor, near: Nearest, train: Any, path: Path, shown: int = 12, ink: bool = False
) -> None:
    """Write the samples nearest to training data, by d_1/d_2, above their two neighbours there."""
    ratio = near.distances[:, 0] / near.distances[:, 1].clamp_min(1e-12)
    order = ratio.argsort()[:shown]
    figure, axes = new_figure(0.62 * len(order) + 1.5, 2.5)
    first, second = (take(train, near.index[order, k]) for k in (0, 1))
    sheet = torch.cat((x[order], first, second))
    axes.imshow(tile(sheet, len(order), size=48, gap=6, ink=ink))
    side = axes.images[0].get_array().shape
    width, height = side[1] / len(order), side[0] / 3
    axes.set_yticks([height * (k + 0.5) for k in range(3)], ["sample", "nearest", "second"])
    axes.set_xticks(
        [width * (k + 0.5) for k in range(len(order))], [f"{ratio[k]:.2f}" for k in order]
    )
    axes.set_xlabel("distance to the nearest over that to the second (copies: below 0.33)")
    axes.tick_params(length=0, labelsize=8)
    axes.xaxis.label.set_size(8)
    axes.spines[:].set_visible(False)
    axes.grid(False)
    finish(figure, path)
