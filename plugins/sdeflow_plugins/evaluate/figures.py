"""Pictures of a comparison: distance against evaluations, and the samples themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..pictures import COLORS, GREY, finish, is_image, new_figure, tile
from .compare import Cell, flat, number


def draw_distances(
    cells: Sequence[Cell], path: Path, name: str, floor: tuple[str, float] | None = None
) -> None:
    """Write the curves of distance against evaluations, both on log scales.

    floor: (label, distance) of a horizontal line, such as what real data reach. Distances beyond
    50 times the best leave the picture.
    """
    figure, axes = new_figure(6.4, 4)
    for k, label in enumerate(dict.fromkeys(cell.sampler for cell in cells)):
        row = [c for c in cells if c.sampler == label and math.isfinite(c.distance)]
        axes.plot(
            [c.evaluations for c in row],
            [c.distance for c in row],
            marker="o",
            markersize=4,
            color=COLORS[k % len(COLORS)],
            label=flat(label),
        )
    if floor:
        axes.axhline(floor[1], color=GREY, linestyle="--", linewidth=1, label=floor[0])
    budgets = sorted({cell.budget for cell in cells})
    axes.set(xscale="log", yscale="log", xlabel="evaluations of the network", ylabel=name)
    lowest = min([c.distance for c in cells] + ([floor[1]] if floor else []))
    if math.isfinite(lowest) and lowest > 0:
        axes.set_ylim(0.8 * lowest, min(50 * lowest, axes.get_ylim()[1]))
    axes.set_xticks(budgets, [str(b) for b in budgets])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.legend(frameon=False, fontsize=8)
    finish(figure, path)


def draw_samples(
    rows: Sequence[tuple[Cell, Tensor | None]],
    path: Path,
    name: str,
    ink: bool = False,
    shown: int = 10,
) -> None:
    """Write one picture: a row for each sampler, a column for each budget, the same seeds in all.

    Below each cell stand the evaluations that were made and the distance.
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
    for cell, x in rows:
        place = axes[labels.index(cell.sampler), budgets.index(cell.budget)]
        if x is None:
            place.text(0.5, 0.5, "diverged", ha="center", va="center", color=GREY)
        elif is_image(x.shape[1:]):
            place.imshow(tile(x[:shown], -(-shown // 2), ink=ink))
        elif x.shape[1:] == (2,):
            place.scatter(*x.T.numpy(), s=1, color=COLORS[2], linewidths=0)
            place.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal")
        made = f"{cell.evaluations} evaluations, " if cell.evaluations != cell.budget else ""
        place.set_xlabel(f"{made}{name} {number(cell.distance)}", fontsize=8, color=GREY)
    finish(figure, path)
