"""Samplers side by side: every one at every budget of evaluations, measured alike.

All cells start from the same noise: sample k of one sampler and sample k of another began alike.
A finished cell is kept in a file named after everything that it depends on, so that a comparison
that was broken off goes on, and one with a changed setting measures anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdeflow.errors import ArgumentError, PairingError, SdeflowError

from ..generate.sampler import Sampler
from ..train import files
from .bootstrap import Estimate

TOLERANCES = (0.3, 0.03, 0.01, 1e-3)
"""Of an adaptive solver, from the left column to the right: it chooses its own steps."""
SHOWN = 64
"""Samples that are kept with each cell, for the pictures; of small states more, up to so many
numbers: 4096."""


class Plan(NamedTuple):
    """One cell to be measured. label: of the row. budget: of the column."""

    label: str
    budget: int
    sampler: Sampler
    steps: int


@dataclass(frozen=True)
class Cell:
    """One sampler at one budget of evaluations.

    metrics: by name; empty where the run blew up. seconds: of drawing the samples.
    """

    sampler: str
    budget: int
    evaluations: int
    seconds: float
    metrics: dict[str, Estimate]

    def value(self, metric: str) -> float:
        """The metric's value; infinity where the run blew up."""
        return self.metrics[metric].value if metric in self.metrics else math.inf


Drawing = Callable[[Sampler, int], tuple[Tensor, int]]
"""(sampler, steps) -> samples (n, *) and the evaluations of each."""
Measuring = Callable[[Tensor], dict[str, Estimate]]


def plans(
    samplers: Mapping[str, Sampler], budgets: Sequence[int], fixed: Mapping[str, int] | None = None
) -> list[Plan]:
    """What to measure: each sampler with as many steps as a budget of evaluations allows.

    A budget below one step of a solver is left out. Adaptive solvers take a tolerance for each
    budget instead. fixed: rows with their own number of steps, such as presets; they stand in the
    first column that holds their evaluations.
    """
    found: list[Plan] = []
    for label, sampler in samplers.items():
        solver = sampler.make_solver()
        each = 1.0 if math.isnan(solver.evaluations) else solver.evaluations
        if fixed and label in fixed:
            made = math.ceil(each * fixed[label])
            fitting = [budget for budget in budgets if budget >= made]
            if not fitting:
                raise ArgumentError(
                    f"{label!r} makes up to {made} evaluations, more than budgets={list(budgets)}; "
                    f"add a budget of {made}"
                )
            found.append(Plan(label, fitting[0], sampler, fixed[label]))
            continue
        for column, budget in enumerate(budgets):
            if solver.adaptive:
                found.append(Plan(label, budget, tightened(sampler, column), 1))
            elif (steps := int(budget // each)) >= 1:
                found.append(Plan(label, budget, sampler, steps))
    return found


def compare(
    todo: Sequence[Plan], draw: Drawing, measure: Measuring, store: Store | None = None
) -> Iterator[tuple[Cell, Tensor | None]]:
    """Yield (cell, its first samples) for every plan; from the store where it is there already.

    A run that blows up has no metrics and no samples.
    """
    for plan in todo:
        if store is not None and (kept := store.get(plan)) is not None:
            yield kept
            continue
        begun = time.perf_counter()
        try:
            x, evaluations = draw(plan.sampler, plan.steps)
        except (SdeflowError, ArithmeticError) as error:
            if isinstance(error, ArgumentError | PairingError):
                raise
            seconds = time.perf_counter() - begun
            cell, shown = Cell(plan.label, plan.budget, plan.budget, seconds, {}), None
        else:
            seconds = time.perf_counter() - begun
            cell = Cell(plan.label, plan.budget, evaluations, seconds, measure(x))
            shown = x[: max(SHOWN, 4096 // x[0].numel())]
        if store is not None:
            store.put(plan, cell, shown)
        yield cell, shown


def tightened(sampler: Sampler, column: int) -> Sampler:
    """The adaptive sampler with the tolerances of that column."""
    tolerance = TOLERANCES[min(column, len(TOLERANCES) - 1)]
    return replace(sampler, options={"rtol": tolerance, "atol": tolerance, **sampler.options})


class Store:
    """Finished cells in a folder, each under a hash of all that it depends on.

    settings: what all cells share, as JSON takes it: weights, data, seeds, metrics, versions.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.settings = dict(settings)

    def key(self, plan: Plan) -> str:
        """The name of a cell's file; labels and columns are no part of it."""
        what = {"sampler": asdict(plan.sampler), "steps": plan.steps, **self.settings}
        text = json.dumps(what, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    def get(self, plan: Plan) -> tuple[Cell, Tensor | None] | None:
        """The cell and its first samples; None if it is not there whole."""
        import numpy as np

        path = self.folder / f"{self.key(plan)}.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            metrics = {
                name: Estimate(m["value"], m["error"], torch.tensor(m["replicates"]).double())
                for name, m in found["metrics"].items()
            }
            shown = None
            if found["samples"]:
                shown = torch.from_numpy(np.load(path.with_suffix(".npy"), allow_pickle=False))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        made, seconds = found["evaluations"], found["seconds"]
        return Cell(plan.label, plan.budget, made, seconds, metrics), shown

    def put(self, plan: Plan, cell: Cell, shown: Tensor | None) -> None:
        """Keep a finished cell: the samples first, so that the figures never stand alone."""
        import io

        import numpy as np

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.key(plan)}.json"
        if shown is not None:
            buffer = io.BytesIO()
            np.save(buffer, shown.numpy())
            files.replace(path.with_suffix(".npy"), buffer.getvalue())
        found = {
            "label": flat(plan.label),
            "sampler": asdict(plan.sampler),
            "steps": plan.steps,
            **self.settings,
            "evaluations": cell.evaluations,
            "seconds": cell.seconds,
            "samples": shown is not None,
            "metrics": {
                name: {"value": e.value, "error": e.error, "replicates": e.replicates.tolist()}
                for name, e in cell.metrics.items()
            },
        }
        files.replace(path, json.dumps(found, indent=1, default=str).encode())


def flat(label: str) -> str:
    """A label in one line."""
    return label.replace("\n", " ")
