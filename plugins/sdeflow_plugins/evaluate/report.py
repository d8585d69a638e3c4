"""An evaluation as JSON and as a table."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .bootstrap import Estimate
from .panel import METRICS, Measured

PACKAGES = ("sdeflow", "torch", "numpy", "scikit-learn", "diffusers")


def plain(measured: Measured) -> dict[str, Any]:
    """What was measured, as JSON takes it."""
    metrics = {
        name: each.plain() | {"drawn_again": METRICS[name].items}
        for name, each in measured.metrics.items()
    }
    return {"metrics": metrics} | ({"per_class": measured.per_class} if measured.per_class else {})


def versions() -> dict[str, str]:
    """The versions of what the figures depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def number(each: Estimate) -> str:
    """`value ± error`, the error with two digits and the value with as many places."""
    if not math.isfinite(each.value):
        return "diverged"
    if not math.isfinite(each.error) or each.error <= 0:
        return f"{each.value:.4g}"
    if abs(each.value) >= 1e5:
        return f"{each.value:.3g} ± {each.error:.2g}"
    places = min(6, max(0, 1 - math.floor(math.log10(each.error))))
    return f"{each.value:.{places}f} ± {each.error:.{places}f}"


def table(columns: Mapping[str, Mapping[str, Estimate]]) -> str:
    """Metrics by row, sets of samples by column."""
    names = [name for name in METRICS if any(name in column for column in columns.values())]
    rows = [["", *columns]]
    for name in names:
        entries = (number(c[name]) if name in c else "-" for c in columns.values())
        rows.append([METRICS[name].label, *entries])
    return aligned(rows)


def class_table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """The share of samples whose class is the one asked for, class by class."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    rows = [["class as asked", *columns]]
    for name in names:
        rows.append([name, *(f"{c[name]:.1%}" if name in c else "-" for c in columns.values())])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]], gap: int = 3) -> str:
    """Rows of text in columns: the first to the left, the others to the right."""
    wide = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        cells = [f"{cell:>{w + gap}}" for cell, w in zip(rest, wide[1:], strict=True)]
        lines.append(f"{first:<{wide[0]}}" + "".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def seed_range(seeds: Sequence[int]) -> str:
    """Seeds as `sdeflow sample` reads them, such as 0-999 or 0-9,20."""
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and seed == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], seed]
        else:
            parts.append([seed])
    return ",".join("-".join(map(str, dict.fromkeys((p[0], p[-1])))) for p in parts)
