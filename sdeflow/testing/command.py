"""`sdeflow check`: certificates on the command line, and tables over many of them."""

from __future__ import annotations

import functools
import importlib
import json as json_format
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import ArgumentError, UnknownNameError, one_of, positive_int
from ..plugins import catalogue, get, plugins
from ..sde import SDE
from ..solver import Solver
from .certificate import check_solver
from .kernel import check_sde
from .report import Check, Report

PASSED, FAILED = 0, 1
CHECKS: dict[str, Any] = {"solver": check_solver, "sde": check_sde}
TITLES = {"solver": "Solvers", "sde": "SDEs"}


class Outcome(NamedTuple):
    """What came of one name."""

    name: str
    kind: str
    report: Report


def check(
    *names: str,
    all: bool = False,
    kind: str = "",
    only: Sequence[str] = (),
    jobs: int = 1,
    markdown: bool = False,
    json: str = "",
) -> int:
    """Certify solvers and SDEs: orders and laws measured, behaviour tried; status 1 if any fails.

    One name prints every check; several, or --all, a table, and what failed.

    Args:
        names: registered names, or module:object of your own, found from this folder too.
        all: everything that is registered.
        kind: solver or sde; for --all only these, for a name that both have, which.
        only: for solvers, groups of checks such as [orders, batch], instead of all of them.
        jobs: processes that work side by side.
        markdown: print the table in Markdown.
        json: a file to write the figures to.
    """
    kinds = [one_of("kind", kind, CHECKS)] if kind else list(CHECKS)
    if bool(names) == all:
        raise ArgumentError("names: give names or --all, such as `sdeflow check ddim`")
    asked = [(each, kind) for each in names]
    if all:
        asked = [(name, each) for each in kinds for name in catalogue(each)]
    outcomes: list[Outcome] = []
    begun = time.perf_counter()
    for outcome in run(asked, tuple(only), positive_int("jobs", jobs)):
        if len(asked) == 1 and not markdown:
            print(outcome.report)
        elif not markdown:
            if not outcomes or outcomes[-1].kind != outcome.kind:
                print(_row(outcome.kind, HEADS[outcome.kind], asked))
            print(_row(outcome.kind, cells(outcome), asked), flush=True)
        outcomes.append(outcome)
    if markdown:
        print(table(outcomes))
    bad = [outcome for outcome in outcomes if not outcome.report.ok]
    if len(asked) > 1:
        for outcome in bad:
            print(f"\n{outcome.name}")
            for failure in outcome.report.failures:
                print(f"  FAIL  {failure.name}: {failure.detail}")
        took = time.perf_counter() - begun
        print(f"\n{len(outcomes) - len(bad)} of {len(outcomes)} passed in {took:.0f} s")
    if json:
        Path(json).write_text(json_format.dumps([_plain(o) for o in outcomes], indent=1) + "\n")
    return FAILED if bad else PASSED


def run(asked: Sequence[tuple[str, str]], only: tuple[str, ...], jobs: int) -> Iterator[Outcome]:
    """The outcomes of (name, kind) pairs, in their order."""
    found = [(name, _kind_of(name, kind)) for name, kind in asked]
    work = functools.partial(_outcome, only=only)
    if jobs == 1 or len(found) == 1:
        yield from map(work, found)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        yield from pool.map(work, found)


def _outcome(pair: tuple[str, str], only: tuple[str, ...]) -> Outcome:
    name, kind = pair
    begun = time.perf_counter()
    try:
        if kind == "solver":
            known = ":" not in name  # and gives the report its title
            report = check_solver(name if known else made(name, kind), only or None)
        else:
            report = check_sde(made(name, kind))
    except ArgumentError:
        raise
    except Exception as error:  # a stranger's object may do anything
        report = Report(name, [Check("made", False, f"{type(error).__name__}: {error}")])
    report.figures["seconds"] = time.perf_counter() - begun
    return Outcome(name, kind, report)


# ---- from names to objects


def made(name: str, kind: str) -> Any:
    """The object of that name, or the one that module:object says."""
    if ":" not in name:
        return get(kind, name)
    thing = _imported(name)
    return thing() if not isinstance(thing, Solver | SDE) else thing


def _kind_of(name: str, kind: str) -> str:
    if ":" in name:
        thing = _imported(name)
        if not isinstance(thing, Solver | SDE):
            if not callable(thing):
                raise ArgumentError(
                    f"{name} is {thing!r}; it must be a solver or an SDE, or make one when called"
                )
            try:
                thing = thing()
            except TypeError as error:
                raise ArgumentError(
                    f"{name} cannot be made without arguments ({error}); name an object instead, "
                    f"such as `example = {name.partition(':')[2]}(...)`, module:example"
                ) from error
        if not isinstance(thing, Solver | SDE):
            raise ArgumentError(f"{name} makes {thing!r}, which is neither a Solver nor an SDE")
        return "solver" if isinstance(thing, Solver) else "sde"
    for each in [kind] if kind else CHECKS:
        if name in catalogue(each):
            return each
    if kind:
        return plugins().find(kind, name).kind
    try:
        get("solver", name)
    except UnknownNameError as error:
        told = str(error).split(";")[0]
        if name.lower() != name or len(told) > 200:
            told = f"{name!r} is unknown"
        raise UnknownNameError(
            f"{told}, and no SDE either; `sdeflow list --kind solver` tells the names, and an "
            "object of your own is module:object"
        ) from error
    return "solver"


def _imported(name: str) -> Any:
    module, _, path = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except Exception as error:
        raise ArgumentError(
            f"{name}: the module {module!r} cannot be imported from here "
            f"({type(error).__name__}: {error})"
        ) from error
    try:
        return functools.reduce(getattr, path.split("."), found)
    except AttributeError as error:
        raise ArgumentError(f"{name}: {error}") from error


# ---- tables

HEADS = {
    "solver": (
        "solver", "order", "measured", "weak order", "measured", "evaluations", "points", "fused",
        "noise", "needs", "verdict", "seconds",
    ),
    "sde": ("SDE", "checks", "verdict", "seconds"),
}  # fmt: skip


def cells(outcome: Outcome) -> tuple[str, ...]:
    """One row: what is declared and what was measured."""
    report, figures = outcome.report, outcome.report.figures
    verdict = "ok" if report.ok else f"FAILED ({len(report.failures)})"
    end = (verdict, f"{figures['seconds']:.1f}")
    if outcome.kind == "sde":
        return (outcome.name, str(len(report.checks)), *end)
    if "evaluations" not in figures:
        return (outcome.name, *["-"] * 9, *end)
    return (*claims(outcome.name, figures), *end)


def claims(name: str, figures: dict[str, Any]) -> tuple[str, ...]:
    """The part of a row that does not change from run to run."""

    def number(key: str, digits: int = 2) -> str:
        value = figures.get(key)
        if value is None or not math.isfinite(value):
            return "-"
        return f"{value:g}" if key.startswith("declared") else f"{value:.{digits}f}"

    def yes(key: str, word: str = "yes") -> str:
        return word if figures.get(key) else "-"

    evaluations = figures["evaluations"]
    order = "by tolerance" if figures["adaptive"] and figures["declared order"] else number("order")
    return (
        name,
        number("declared order"),
        order,
        number("declared weak order"),
        number("weak order"),
        "varies" if math.isnan(evaluations) else f"{evaluations:g}",
        yes("exact on points", "exact"),
        yes("fused"),
        yes("stochastic", "own"),
        ", ".join(figures["needs"]) or "-",
    )


def table(outcomes: Sequence[Outcome]) -> str:
    """Tables in Markdown, one for each kind."""
    lines: list[str | None] = []
    for kind in CHECKS:
        rows = [cells(outcome)[:-1] for outcome in outcomes if outcome.kind == kind]
        if not rows:
            continue
        head = HEADS[kind][:-1]
        lines += ["" if lines else None, f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(line for line in lines if line is not None)


def _row(kind: str, row: Sequence[str], asked: Sequence[tuple[str, str]]) -> str:
    first = max(len(name) for name, _ in asked) + 2
    widths = [first, *(len(head) + 2 for head in HEADS[kind][1:])]
    if kind == "solver":
        widths[2], widths[9] = 14, 26
    return "  " + "".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()


def _plain(outcome: Outcome) -> dict[str, Any]:
    """For JSON, which knows neither NaN nor infinity."""
    figures = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in outcome.report.figures.items()
    }
    failures = [f"{failure.name}: {failure.detail}" for failure in outcome.report.failures]
    return {
        "name": outcome.name, "kind": outcome.kind, "ok": outcome.report.ok,
        "figures": figures, "failures": failures,
    }  # fmt: skip
