"""What a comparison says: its tables, and who won by how much against the error bar."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from ..train import files
from .bootstrap import difference
from .compare import Cell, flat
from .panel import METRICS
from .report import aligned, number

APART = 2.0
"""Standard errors of the difference beyond which two samplers are told apart."""


def tables(cells: Sequence[Cell], metrics: Sequence[str]) -> str:
    """For each metric a table: a row for each sampler, `value ± error (evaluations)` by budget."""
    return "\n\n".join(_table(cells, metric) for metric in metrics)


def verdicts(cells: Sequence[Cell], metric: str) -> str:
    """For each budget a line: the best, who is not told apart from it, and how far the rest are."""
    lines = [f"{METRICS[metric].label}, paired on the same seeds (apart: > {APART:g} errors):"]
    for budget in sorted({cell.budget for cell in cells}):
        column = [cell for cell in cells if cell.budget == budget]
        lines.append(f"  <= {budget} evaluations: {_verdict(column, metric)}")
    return "\n".join(lines)


def _verdict(cells: Sequence[Cell], metric: str) -> str:
    ran = [cell for cell in cells if math.isfinite(cell.value(metric))]
    if not ran:
        return "every run diverged"
    sign = -1 if METRICS[metric].better == "high" else 1
    best, *others = sorted(ran, key=lambda cell: sign * cell.value(metric))
    close: list[str] = []
    behind: list[str] = []
    for cell in others:
        gap, error = difference(cell.metrics[metric], best.metrics[metric])
        gap *= sign
        alike = not gap > APART * error
        (close if alike else behind).append(f"{flat(cell.sampler)} (+{gap:.3g} ± {error:.2g})")
    parts = [f"{flat(best.sampler)} is best, {number(best.metrics[metric])}"]
    if close:
        parts.append(f"not told apart from it: {', '.join(close)}")
    if behind:
        parts.append(f"behind: {', '.join(behind)}")
    if diverged := [flat(cell.sampler) for cell in cells if cell not in ran]:
        parts.append(f"diverged: {', '.join(diverged)}")
    return "; ".join(parts)


def _table(cells: Sequence[Cell], metric: str) -> str:
    budgets = sorted({cell.budget for cell in cells})
    rows = [["", *(f"<= {budget}" for budget in budgets)]]
    for label in dict.fromkeys(cell.sampler for cell in cells):
        row = {cell.budget: cell for cell in cells if cell.sampler == label}
        entries = [_entry(row[b], metric) if b in row else "-" for b in budgets]
        rows.append([flat(label), *entries])
    head = f"{METRICS[metric].label} (in brackets the evaluations that were made)"
    return f"{head}\n{aligned(rows)}"


def _entry(cell: Cell, metric: str) -> str:
    said = number(cell.metrics[metric]) if metric in cell.metrics else "diverged"
    return f"{said} ({cell.evaluations})"


def write_table(cells: Sequence[Cell], metrics: Sequence[str], path: Path) -> None:
    """Write the cells as CSV: two columns for each metric, its value and its error."""
    text = io.StringIO(newline="")
    names = [column for metric in metrics for column in (metric, f"{metric}_error")]
    writer = csv.writer(text)
    writer.writerow(["sampler", "budget", "evaluations", "seconds", *names])
    for cell in cells:
        figures: list[float] = []
        for metric in metrics:
            error = cell.metrics[metric].error if metric in cell.metrics else math.nan
            figures += [cell.value(metric), error]
        head = [flat(cell.sampler), cell.budget, cell.evaluations, f"{cell.seconds:.3f}"]
        writer.writerow([*head, *figures])
    files.replace(path, text.getvalue().encode())
