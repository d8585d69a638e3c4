"""The figures of a solver: its orders, the laws it makes, what it does to one-point data.

All exact, by propagation; where the run is not affine on Gaussian data, sampled.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import GridError, NonFiniteError, PairingError, SdeflowError
from ..grid import log_snr
from ..processes import OU
from ..reverse import ReverseSDE
from ..sample import integrate, sample
from .ground import DOUBLE, KERNELS, Subject, reference
from .law import affine
from .orders import SLACK, asymptotic_order
from .problems import GaussianData
from .report import Check

STEPS, COARSER, FINER = (160, 320), (40, 80), (640, 1280)
"""Orders are measured between these; where errors are rounding, or are not yet of the order
declared, elsewhere."""
LADDER = (24, 72, 216, 648, 1944)
"""Laws converge between the first two; where they do not, the others are tried."""
NUMBERS, LIMIT = 8_000, 5.0
"""The sampled tier: a figure beyond 5 standard errors fails, once in 1.7 million by chance."""

Figures = dict[str, Any]


def is_affine(subject: Subject) -> bool:
    """Whether laws can be read off."""
    if subject.solver.adaptive:
        return False
    try:
        subject.errors(subject.ground.sdes[0], subject.etas[0], 3)
    except SdeflowError:
        return False
    return True


# ---- orders


def orders(subject: Subject, figures: Figures) -> Iterator[Check]:
    """Measured orders are at least the declared."""
    solver, sde = subject.solver, subject.ground.sdes[0]
    if subject.flows and solver.adaptive:
        yield _tolerance(subject)
    elif subject.flows:
        check, figures["order"] = _order(
            "order", solver.order, lambda n: _flow_error(subject, subject.times(n, 0.0)), 1e-13,
            subject.least,
        )  # fmt: skip
        yield check
    for eta in subject.etas if figures["affine"] else ():
        declared = subject.declared(eta)
        if not eta and not solver.stochastic:
            continue

        def error(n: int, eta: float = eta) -> float:
            return subject.errors(sde, eta, n)[0]

        name = "weak order" if eta in (0.0, 1.0) else f"weak order, eta = {eta:g}"
        if declared:
            check, found = _order(name, declared, error, 1e-9, subject.least)
            figures.setdefault("weak order", found)
            yield check
        else:
            bias = error(STEPS[-1])
            yield Check(name, bias < 0.05, f"none declared; bias {bias:.1e}")


def _flow_error(subject: Subject, ts: Tensor) -> float:
    """RMS, against a fine reference, on the flow of the curved score."""
    x, exact = reference(subject.ground, float(ts[0]), float(ts[-1]))
    made = integrate(subject.process(0.0), x, ts, subject.solver).x
    return float((made - exact).square().mean().sqrt())


def _order(
    name: str, declared: float | None, error: Callable[[int], float], floor: float, fewest: int
) -> tuple[Check, float]:
    """The check of an order, and the order."""
    least = math.inf if declared is None else declared - SLACK * (1 + declared)
    errors = {n: error(n) for n in STEPS}
    measured = asymptotic_order(errors, floor)
    if measured == math.inf:  # rounding; at fewer steps there is something to see
        errors = {n: error(n) for n in COARSER if n >= fewest} | errors
        measured = asymptotic_order(errors, floor)
    elif not least <= measured < least + 1:
        for n in FINER:
            before, errors[n] = measured, error(n)
            measured = asymptotic_order(errors, floor)
            if abs(measured - before) < 0.5:  # the asymptotic one
                break
    told = f"{measured:.2f} measured, {declared} declared; errors "
    told += ", ".join(f"{e:.1e}" for e in errors.values())
    told += f" at {', '.join(map(str, errors))} steps"
    return Check(name, measured >= least, told), measured


def _tolerance(subject: Subject) -> Check:
    solver: Any = subject.solver
    if not hasattr(solver, "rtol") or not hasattr(solver, "atol"):
        return Check("tolerance", False, "adaptive, and has no rtol and atol to be tried at")
    loose, tight = (
        _flow_error(Subject(dataclasses.replace(solver, rtol=r, atol=r)), subject.times(4, 0.0))
        for r in (1e-3, 1e-6)
    )
    good = tight < 1e-4 and tight < loose / 10
    return Check("tolerance", good, f"error {loose:.1e} at rtol = 1e-3, {tight:.1e} at 1e-6")


# ---- laws


def laws(subject: Subject, figures: Figures) -> Iterator[Check]:
    """The marginals are those of the data, and the noise put in is that of the process."""
    if not figures["affine"]:
        yield from _sampled(subject)
        return
    solver, ground = subject.solver, subject.ground
    general = next(eta for eta in (0.5, 1.0, 0.0) if eta in subject.etas)
    for eta in subject.etas:
        sdes = ground.sdes if eta == general else ground.kinds
        found = {type(sde).__name__: _Ladder(subject, sde, eta) for sde in sdes}
        for which, name in enumerate((f"marginals, eta = {eta:g}", f"paths, eta = {eta:g}")):
            if which and (solver.stochastic or not solver.same_paths or ground is not KERNELS):
                continue
            off = [f"{sde}: {said}" for sde, each in found.items() if (said := each.off(which))]
            biased = not which and solver.weak_order == 0 and solver.stochastic  # by its own word
            told = f"off on {'; '.join(off)}" if off else f"converge on {len(sdes)} SDEs"
            yield Check(name, not off or biased, told)
    if subject.flows:
        yield _upwards(subject)


class _Ladder:
    """The errors on one process, of finer and finer grids."""

    def __init__(self, subject: Subject, sde: Any, eta: float, up: bool = False) -> None:
        self.subject, self.sde, self.eta, self.up = subject, sde, eta, up
        self.errors: list[tuple[float, float]] = []

    def off(self, which: int) -> str:
        """What is wrong with the errors of law (0) or path (1): nothing if they converge."""
        for rung in range(1, len(LADDER)):
            while len(self.errors) <= rung:
                n = LADDER[len(self.errors)]
                ts = self.subject.times(n, self.eta, self.sde)
                ts = ts.flip(0) if self.up else ts
                self.errors.append(self.subject.errors(self.sde, self.eta, n, ts))
            coarse, fine = (errors[which] for errors in self.errors[rung - 1 : rung + 1])
            if math.isnan(fine) or converges(coarse, fine):
                return ""
            if not fine < 0.8 * coarse:
                break
        return f"{coarse:.1e} to {fine:.1e} from {LADDER[rung - 1]} to {LADDER[rung]} steps"


def converges(coarse: float, fine: float) -> bool:
    """Whether errors on one grid, and on one of three times the steps, go to zero."""
    return fine <= max(1e-4, coarse / 2) and fine < 0.5


def _upwards(subject: Subject) -> Check:
    """The flow carries data to noise as well."""
    ladder = _Ladder(subject, subject.ground.sdes[0], 0.0, up=True)
    try:
        off = ladder.off(0)
    except GridError as error:
        return Check("data to noise", True, f"refused: {error}")
    return Check("data to noise", not off, off or "converges")


def _sampled(subject: Subject) -> Iterator[Check]:
    """Mean and variance of samples on Gaussian data."""
    solver, sde = subject.solver, subject.ground.sdes[0]
    steps = 10 if solver.adaptive else 200
    mean, variance = torch.full((8,), 0.3, dtype=DOUBLE), torch.linspace(0.1, 2, 8).double()
    data = GaussianData(sde, mean, variance)
    for eta in subject.etas:
        process, ts = ReverseSDE(sde, data, eta), subject.times(steps, eta)
        shape = (NUMBERS // 8, 8)
        run = sample(process, shape, solver=subject.at(eta), grid=ts, seed=0, dtype=DOUBLE)
        mean, variance = data.law(ts[-1])
        z = (run.x - mean) / variance.sqrt()
        off = abs(float(z.mean())) - LIMIT / NUMBERS**0.5
        wide = abs(float(z.var()) - 1) - LIMIT * (2 / NUMBERS) ** 0.5
        allowed = 0.25 if solver.weak_order == 0 else 0.05  # 0: declared not to converge
        yield Check(
            f"marginals, eta = {eta:g}, sampled",
            off < allowed and wide < allowed,
            f"mean {float(z.mean()):+.3f} (0), variance {float(z.var()):.3f} (1) of {NUMBERS} "
            f"numbers; a bias above {allowed} fails, by chance once in 1.7 million",
        )


# ---- one-point data


def points(subject: Subject, figures: Figures) -> Iterator[Check]:
    """One-point data are kept exactly where that is declared: on 9 steps of any grid, near the
    data, and at sigma = 0."""
    if not figures["affine"]:
        return
    solver, ground = subject.solver, subject.ground
    inside = max(_point(subject, s, eta, None) for s in ground.sdes for eta in subject.etas)
    figures["exact on points"] = inside < 1e-9
    told = "kept exactly" if inside < 1e-9 else f"off by {inside:.1e} in 9 steps"
    declared = ", declared exact" if solver.point_exact else ""
    yield Check("one-point data", inside < 1e-9 or not solver.point_exact, told + declared)
    if not solver.point_exact:
        return
    if ground is KERNELS:
        sde: Any = ground.sdes[0]
        low = float(sde.time_of_log_snr(torch.tensor(28.0)))
        near = max(
            _point(subject, sde, eta, log_snr(sde, 9, t_max=0.5, t_min=low)) for eta in subject.etas
        )
        yield Check("points near the data", near < 1e-6, f"off by {near:.0e} at log-SNR 28")
    try:
        end = max(
            _point(subject, s, eta, torch.cat((subject.times(3, eta, s), torch.zeros(1).double())))
            for s in ground.kinds
            for eta in subject.etas
        )
    except (GridError, NonFiniteError):
        return  # `short_grids` tells
    yield Check("points at sigma = 0", end < 1e-9, f"off by {end:.0e}")


def _point(subject: Subject, sde: Any, eta: float, ts: Tensor | None) -> float:
    """The error of mean and standard deviation, in units of the point."""
    ts = subject.times(9, eta, sde) if ts is None else ts
    data = subject.ground.one_point(sde)
    process = ReverseSDE(sde, data, eta)
    if subject.ground is not KERNELS:
        return subject.ground.errors(process, ts, subject.solver)[0] if ts[-1] > 0 else 0.0
    run = affine(process, ts, subject.solver, 1)
    (m_t, v_t), (m_s, v_s) = data.law(ts[0]), data.law(ts[-1])
    mean, variance = run.offset + run.gain * m_t, run.gain**2 * v_t + run.noise
    relative = (variance / v_s - 1).abs() if bool(v_s > 0) else variance.sqrt()
    return float(torch.maximum((mean / m_s - 1).abs(), relative).nan_to_num(nan=math.inf).max())


# ---- forward SDEs


def forward(subject: Subject, figures: Figures) -> Iterator[Check]:
    """A solver that takes a forward SDE runs it up in time, to the right law."""
    solver, sde = subject.solver, OU()
    try:
        solver.check(sde)
    except PairingError:
        return
    if not figures["affine"]:
        return
    start, v_start, errors = 0.5, 0.3, []
    for n in LADDER[:2]:
        ts = torch.linspace(0, 2, n + 1, dtype=DOUBLE)
        run = affine(sde, ts, solver, 1)
        a, s = sde.alpha(ts[-1]), sde.sigma(ts[-1])
        mean, variance = run.offset + run.gain * start, run.gain**2 * v_start + run.noise
        exact = a * a * v_start + s * s
        error = torch.maximum((mean - a * start).abs() / exact.sqrt(), (variance / exact - 1).abs())
        errors.append(float(error))
    told = f"OU: error {errors[0]:.1e} to {errors[1]:.1e} in {LADDER[0]} and {LADDER[1]} steps"
    yield Check("a forward SDE", converges(*errors), told)
