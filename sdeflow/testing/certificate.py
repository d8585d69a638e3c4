"""`check_solver`: the certificate of a solver, in one call.

Orders, laws and one-point data are measured exactly, by propagating Gaussians (`measures`); what is
not a matter of numbers is tried: what a run must do (`behaviour`) and what it must leave alone
(`purity`). A solver whose run is not affine on Gaussian data is sampled instead, with a stated
false-alarm rate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from ..errors import ArgumentError, SdeflowError, one_of
from ..plugins import get
from ..solver import Solver
from . import behaviour, measures, purity
from .ground import Subject
from .report import Check, Report

GROUPS: dict[str, Callable[[Subject, dict[str, Any]], Iterator[Check]]] = {
    "orders": measures.orders,
    "laws": measures.laws,
    "points": measures.points,
    "forward": measures.forward,
    "evaluations": behaviour.evaluations,
    "eta to zero": behaviour.eta_to_zero,
    "short grids": behaviour.short_grids,
    "shapes": behaviour.shapes,
    "refusals": behaviour.refusals,
    "non-finite": behaviour.non_finite,
    "host": behaviour.host,
    "batch": purity.batch,
    "state": purity.state,
    "writes": purity.writes,
    "noise": purity.noise,
    "scores": purity.scores,
    "gradients": purity.gradients,
    "tableau": purity.tableau,
}
"""The groups of checks, by the name that `only` knows them by; "runs" is always made."""


def check_solver(solver: Solver | str, only: Iterable[str] | None = None) -> Report:
    """Certify a solver: one table, `.ok`, and `.figures` with the measured orders.

    solver: an object or a registered name. only: some of GROUPS; None for all of them.
    Third parties: `check_solver(Mine()).raise_if_failed()` in a test, or `sdeflow check
    module:object` on the command line.
    """
    name = solver if isinstance(solver, str) else repr(solver)
    solver = get("solver", solver) if isinstance(solver, str) else solver
    if not isinstance(solver, Solver):
        raise ArgumentError(f"solver={solver!r} must be a Solver, such as DDIM(), or a name")
    groups = list(GROUPS) if only is None else [one_of("only", each, GROUPS) for each in only]
    begun, subject = time.perf_counter(), Subject(solver)
    report = Report(f"{name}: {type(solver).__name__}")
    report.figures |= {
        "declared order": solver.order,
        "declared weak order": solver.weak_order,
        "evaluations": solver.evaluations,
        "needs": list(solver.needs),
        "adaptive": solver.adaptive,
        "stochastic": solver.stochastic,
    }
    report.run("runs", lambda: _runs(subject))
    if subject.etas:
        report.figures["affine"] = measures.is_affine(subject)
        report.figures["fused"] = behaviour.is_fused(subject)
        for group in groups:
            report.run(group, partial(GROUPS[group], subject, report.figures))
    report.figures["seconds"] = time.perf_counter() - begun
    return report


def _runs(subject: Subject) -> Iterator[Check]:
    """It integrates something, and says of what order."""
    solver, taken = subject.solver, subject.accepted[subject.ground]
    undeclared = [eta for eta in taken if eta not in subject.etas]
    where = f"reversed {type(subject.ground.sdes[0]).__name__}"
    shown = ", ".join(f"{eta:g}" for eta in taken) or "none"
    told = f"on {where} at eta = {shown}"
    for eta in undeclared[:1]:
        missing = "weak_order" if eta else "order"
        told += f"; it accepts eta = {eta:g} and declares no {missing}: declare it, or refuse by "
        told += "`needs`"
    if not taken:
        try:
            solver.check(subject.process(0.0))
        except SdeflowError as error:
            told += f": {error}"
    yield Check("runs", bool(taken) and not undeclared, told)
