"""Samplers side by side: the table of evaluations against distance.

All cells start from the same noise: sample k of one sampler and sample k of another began alike.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdeflow.denoiser import Denoiser
from sdeflow.errors import ArgumentError, PairingError, SdeflowError

from ..generate.sampler import Sampler

Distance = Callable[[Tensor], float]


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
