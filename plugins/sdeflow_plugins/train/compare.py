"""Samplers side by side: the table and the pictures of evaluations against distance.

All cells start from the same noise: sample k of one sampler and sample k of another began alike.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdeflow.denoiser import Denoiser
from sdeflow.errors import ArgumentError, PairingError, SdeflowError
from sdeflow.reverse import ReverseSDE
from sdeflow.sample import Solution, sample
from sdeflow.solver import Solver

from .build import build
from .pictures import COLORS, GREY, finish, is_image, new_figure, tile

Distance = Callable[[Tensor], float]


@dataclass(frozen=True)
class Sampler:
    """A solver by name with its options, the eta of its process, and its grid.

    eta: None for 0 where the solver runs the probability flow, else 1.
    """

    solver: str = "dpmpp_2m"
    options: dict[str, Any] = field(default_factory=dict)
    eta: float | None = None
    grid: str = "log_snr"
    grid_options: dict[str, Any] = field(default_factory=dict)

    def process(self, denoiser: Denoiser) -> ReverseSDE:
        """The process that this sampler runs."""
        if self.eta is not None:
            return ReverseSDE(denoiser.sde, denoiser, self.eta)
        flow = ReverseSDE(denoiser.sde, denoiser, 0.0)
        try:
            self.make_solver().check(flow)
        except PairingError:
            return ReverseSDE(denoiser.sde, denoiser, 1.0)
        return flow

    def make_solver(self) -> Solver:
        """The solver."""
        return build("solver", self.solver, self.options)

    def make_grid(self) -> Callable[..., Tensor]:
        """The grid, a function (sde, n) to times."""
        return build("grid", self.grid, self.grid_options)

    def run(
        self,
        denoiser: Denoiser,
        shape: Sequence[int],
        steps: int,
        seed: int | Sequence[int] = 0,
        device: torch.device | str = "cpu",
        progress: bool = False,
    ) -> Solution:
        """A batch of samples of that shape (B, *)."""
        return sample(
            self.process(denoiser),
            shape,
            solver=self.make_solver(),
            steps=steps,
            grid=self.make_grid(),
            seed=seed,
            device=device,
            progress=progress,
        )


SAMPLERS: dict[str, Sampler] = {
    # label                    solver, its process by eta: 0 the flow, 1 the reverse SDE; its grid
    "DDPM": Sampler("ddpm", eta=1.0, grid="uniform"),
    "DDIM": Sampler("ddim", eta=0.0),
    "DPM++2M": Sampler("dpmpp_2m", eta=0.0),
    "Euler-Maruyama": Sampler("euler_maruyama", eta=1.0, grid="uniform"),
    "dopri5\n(torchdiffeq)": Sampler("torchdiffeq", {"method": "dopri5"}, eta=0.0),
    "SRK\n(torchsde)": Sampler("torchsde", {"method": "srk"}, eta=1.0),
}

TOLERANCES = (0.3, 0.03, 0.01, 1e-3)
"""Of an adaptive solver, from the left column to the right: it chooses its own steps."""


@dataclass(frozen=True)
class Cell:
    """One sampler at one budget of evaluations."""

    sampler: str
    budget: int
    evaluations: int
    distance: float
    seconds: float


def compare(
    denoiser: Denoiser,
    shape: Sequence[int],
    samplers: dict[str, Sampler],
    budgets: Sequence[int],
    distance: Distance,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Cell, Tensor | None]]:
    """Yield (cell, samples) for every sampler at every budget of evaluations.

    A budget below one step of the solver is left out; a run that blows up has distance infinity
    and no samples. Adaptive solvers take a tolerance for each budget instead, and the number of
    evaluations they chose is in the cell.
    """
    for label, sampler in samplers.items():
        solver = sampler.make_solver()
        each = 1.0 if math.isnan(solver.evaluations) else solver.evaluations
        for column, budget in enumerate(budgets):
            here, steps = sampler, 1
            if solver.adaptive:
                here = tightened(sampler, column)
            elif (steps := int(budget // each)) < 1:
                continue
            begun = time.perf_counter()
            try:
                solution = here.run(denoiser, shape, steps, seed, device)
                x, evaluations = solution.x, solution.nfe
            except (SdeflowError, ArithmeticError) as error:
                if isinstance(error, ArgumentError | PairingError):
                    raise
                yield Cell(label, budget, budget, math.inf, time.perf_counter() - begun), None
                continue
            seconds = time.perf_counter() - begun
            x = x.cpu()
            yield Cell(label, budget, evaluations, distance(x), seconds), x


def tightened(sampler: Sampler, column: int) -> Sampler:
    """The adaptive sampler with the tolerances of that column."""
    tolerance = TOLERANCES[min(column, len(TOLERANCES) - 1)]
    options = {"rtol": tolerance, "atol": tolerance, **sampler.options}
    return Sampler(sampler.solver, options, sampler.eta, sampler.grid, sampler.grid_options)


def write_table(cells: Sequence[Cell], path: Path) -> None:
    """Write the cells as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(cells[0])))
        writer.writeheader()
        for cell in cells:
            row = asdict(cell)
            row["sampler"] = flat(cell.sampler)
            writer.writerow(row | {"seconds": f"{cell.seconds:.3f}"})


def table(cells: Sequence[Cell], name: str) -> str:
    """The cells as text: a row for each sampler, `distance (evaluations)` in each column."""
    budgets = sorted({cell.budget for cell in cells})
    wide = max(len(flat(cell.sampler)) for cell in cells) + 2
    lines = [
        f"{name}, in brackets the evaluations that were made",
        " " * wide + "".join(f"{f'<= {b}':>16}" for b in budgets),
    ]
    for label in dict.fromkeys(cell.sampler for cell in cells):
        row = {cell.budget: cell for cell in cells if cell.sampler == label}
        entries = [
            f"{number(row[b].distance)} ({row[b].evaluations})" if b in row else "-"
            for b in budgets
        ]
        lines.append(f"{flat(label):<{wide}}" + "".join(f"{entry:>16}" for entry in entries))
    return "\n".join(lines)


def number(distance: float) -> str:
    """A distance with three digits that count."""
    if not math.isfinite(distance):
        return "diverged"
    return f"{distance:.3g}"


def flat(label: str) -> str:
    """A label in one line."""
    return label.replace("\n", " ")


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
