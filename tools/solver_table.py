"""The tables of solvers in README.md and docs/solvers.md, made from declarations and certificates.

`python tools/solver_table.py [name ...] [--jobs 2]` certifies the solvers named, all of them where
none is, and writes both files; rows of the others keep their figures. `--claims` certifies nothing,
and only brings the declarations up to date. Exits with 1 where a certificate fails.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path
from typing import Any

import sdeflow
from sdeflow.testing.command import run

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- solvers: made by tools/solver_table.py -->", "<!-- end -->"
CLAIMS = ("name", "order", "weak order", "evaluations", "one-point data", "runs on")
MEASURED = ("order, measured", "weak order, measured", "fused")
WORDS = {
    "ode": "eta = 0",
    "eta=1": "eta = 1",
    "noise": "with noise",
    "one alpha": "one alpha",
    "additive": "additive noise",
    "commutative": "commuting noise",
    "diagonal": "diagonal noise",
}


def claims() -> dict[str, tuple[str, ...]]:
    """name -> the rest of CLAIMS, of every solver of this distribution."""
    found = {}
    for name, entry in sdeflow.catalogue("solver").items():
        if entry.distribution == "sdeflow":
            solver = sdeflow.get("solver", name)
            found[name] = (
                _number(solver.order, solver.adaptive),
                _number(solver.weak_order, solver.adaptive),
                "varies" if math.isnan(solver.evaluations) else f"{solver.evaluations:g}",
                "exact" if solver.point_exact else "-",
                _runs_on(solver),
            )
    return found


def _number(order: float | None, adaptive: bool = False) -> str:
    if order is None:
        return "-"
    return f"{order:g}, adaptive" if adaptive else f"{order:g}"


def _runs_on(solver: sdeflow.Solver) -> str:
    kind = "any process"
    if "gaussian" in solver.needs:
        kind = "Gaussian SDEs"
    elif "system" in solver.needs:
        kind = "linear systems"
    elif "ode" in solver.needs:
        kind = "any ODE"
    limits = [WORDS[need] for need in solver.needs if need in WORDS and kind != "any ODE"]
    own = ["adds noise of its own"] if solver.stochastic else []
    return ", ".join([kind, *limits, *own])


def short_table(found: dict[str, tuple[str, ...]]) -> str:
    """Solvers that declare the same share a row; those of one order stand together."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, row in found.items():
        rows.setdefault(row, []).append(f"`{name}`")
    lines = [_line(CLAIMS), "|---" * len(CLAIMS) + "|"]
    for row in sorted(rows, key=lambda row: (row[4], row[0], row[1], row[2])):
        lines.append(_line((", ".join(rows[row]), *row)))
    return "\n".join(lines)


def long_table(found: dict[str, tuple[str, ...]], figures: dict[str, tuple[str, ...]]) -> str:
    """A row for each name, with what was measured."""
    head = (*CLAIMS, *MEASURED)
    lines = [_line(head), "|---" * len(head) + "|"]
    blank = ("?",) * len(MEASURED)
    lines += [_line((f"`{n}`", *row, *figures.get(n, blank))) for n, row in found.items()]
    return "\n".join(lines)


def measured(figures: dict[str, Any]) -> tuple[str, ...]:
    """The cells of MEASURED."""

    def number(key: str) -> str:
        value = figures.get(key)
        return "-" if value is None or not math.isfinite(value) else f"{value:.2f}"

    return number("order"), number("weak order"), "yes" if figures.get("fused") else "-"


def committed(text: str) -> dict[str, tuple[str, ...]]:
    """name -> cells of MEASURED, as a long table holds them."""
    table = text.partition("<!-- solvers:")[2].partition(END)[0].splitlines()
    rows = (line.strip("|").split("|") for line in table if line.startswith("| `"))
    cells = ([cell.strip() for cell in row] for row in rows)
    return {row[0].strip("`"): tuple(row[-len(MEASURED) :]) for row in cells}


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def between(text: str, table: str) -> str:
    """The text with the table put between its markers."""
    pattern = re.compile(r"<!-- solvers: .*?-->\n.*?" + re.escape(END), re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"no place for the table: put the lines {BEGIN} and {END} into the text")
    return pattern.sub(lambda _: f"{BEGIN}\n{table}\n{END}", text, count=1)


def main() -> int:
    """Certify, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="solvers to certify; all where none is given")
    parser.add_argument("--jobs", type=int, default=1, help="processes that work side by side")
    parser.add_argument("--claims", action="store_true", help="certify nothing")
    options = parser.parse_args()
    found, long = claims(), ROOT / "docs" / "solvers.md"
    figures, failed = committed(long.read_text(encoding="utf-8")), 0
    names = [] if options.claims else options.names or list(found)
    for outcome in run([(name, "solver") for name in names], (), options.jobs):
        print(f"{outcome.name}: {'ok' if outcome.report.ok else outcome.report}", flush=True)
        figures[outcome.name] = measured(outcome.report.figures)
        failed += not outcome.report.ok
    for file, table in (
        (ROOT / "README.md", short_table(found)),
        (long, long_table(found, figures)),
    ):
        file.write_text(between(file.read_text(encoding="utf-8"), table), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
