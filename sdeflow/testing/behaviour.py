"""What a run must do, tried on a solver: evaluations, short grids, shapes, refusals, bad scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import GridError, NonFiniteError, PairingError, SolverError
from ..processes import CLD, OU, VP
from ..reverse import ReverseSDE
from ..sample import integrate
from ..sde import GaussianSDE, as_time
from ..solver import StepSolver
from ..tableau import trace
from .ground import DOUBLE, ETAS, KERNELS, Subject
from .report import Check

Figures = dict[str, Any]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Watched:
    """A score with a record of the times at which it is asked."""

    def __init__(self, score: Any) -> None:
        self.times: list[float] = []
        self._score = score
        if callable(getattr(score, "denoise", None)):
            self.denoise = self._kept(score.denoise)
        self._call = self._kept(score)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self._call(x, t)

    def _kept(self, function: Any) -> Any:
        def kept(x: Tensor, t: Tensor) -> Tensor:
            self.times += as_time(t).reshape(-1).tolist()
            return function(x, t)

        return kept


def evaluations(subject: Subject, figures: Figures) -> Iterator[Check]:
    """As many as declared, and none where no network was trained: beyond the ends of the grid."""
    solver, eta = subject.solver, subject.etas[0]
    counts = []
    x = subject.ground.start(2)
    for n in (10, 20):
        watched, ts = Watched(subject.ground.curved()), subject.times(n, eta)
        run = integrate(subject.process(eta, watched), x, ts, subject.at(eta), seed=0)
        counts.append(run.nfe)
        high = float(subject.ground.sdes[0].T if solver.stochastic else ts[0]) * (1 + 1e-9)
        beyond = [t for t in watched.times if not float(ts[-1]) * (1 - 1e-9) <= t <= high]
    if not solver.adaptive and not math.isnan(solver.evaluations):
        made, wanted = counts[1] - counts[0], 10 * solver.evaluations
        own = solver.stochastic and made > wanted  # Restart goes up again where it passes a level
        told = f"{made / 10:g} a step, {solver.evaluations:g} declared"
        yield Check("evaluations", made == wanted or own, told)
    told = f"at t = {beyond[0]:.6g}, outside the grid" if beyond else "inside the grid"
    yield Check("times of evaluation", not beyond, told)


def eta_to_zero(subject: Subject, figures: Figures) -> Iterator[Check]:
    """The SDE with little noise is the probability flow."""
    if subject.solver.adaptive or not subject.flows or 0.5 not in subject.etas:
        return
    near, limit = (subject.run(eta) for eta in (1e-7, 0.0))
    gap = float((near - limit).abs().max())
    yield Check("eta to zero", gap < 1e-5, f"{gap:.1e} from the probability flow at eta = 1e-7")


def short_grids(subject: Subject, figures: Figures) -> Iterator[Check]:
    """1, 2 and 3 steps; and the last one to sigma = 0, if the solver knows of alpha and sigma."""
    solver, ground = subject.solver, subject.ground
    knows = bool({"gaussian", "system"} & set(solver.needs))
    wrong: list[str] = []
    ends: list[str] = []
    slow = solver.adaptive and not knows  # it would go down to sigma = 0 in ever smaller steps
    for eta in subject.etas[: 2 if slow else None]:
        for sde in (ground.sdes[0], ground.sdes[-3 % len(ground.sdes)])[: 1 if slow else 2]:
            data = ground.gaussian(sde)
            for n in (1, 2, 3):
                for zero in (False, True)[: 1 if slow else 2]:
                    ts = subject.grid(eta, sde)(sde, n)
                    ts = torch.cat((ts[:-1], torch.zeros(1, dtype=DOUBLE))) if zero else ts
                    where = f"{n} steps to t = {float(ts[-1]):.2g} on {type(sde).__name__}"
                    watched = Watched(data)
                    x = sde.prior(_numbers((4, *_width(subject, data))), ts[0])
                    try:
                        run = integrate(
                            ReverseSDE(sde, watched, eta), x, ts, subject.at(eta), seed=0
                        )
                    except SolverError as error:
                        ends += [f"{where}: {error}"] * zero
                        continue
                    except (GridError, NonFiniteError) as error:
                        (ends if zero else wrong).append(f"{where}: {error}")
                        continue
                    if not bool(run.x.isfinite().all()):
                        wrong.append(where)
                    if zero and 0.0 in watched.times and knows:
                        ends.append(f"{where}: the score is asked at sigma = 0")
    yield Check("1, 2 and 3 steps", not wrong, wrong[0] if wrong else "finite")
    if not slow:
        figures["sigma = 0"] = not ends
        told = ends[0] if ends else "reached"
        yield Check("sigma = 0", not (ends and knows), told if knows or not ends else "refused")


def _width(subject: Subject, data: Any) -> tuple[int, ...]:
    return tuple(data.mean.shape) if subject.ground is KERNELS else subject.ground.nobody[1:]


def _numbers(shape: tuple[int, ...]) -> Tensor:
    return torch.linspace(-1, 1, math.prod(shape), dtype=DOUBLE).reshape(shape)


def shapes(subject: Subject, figures: Figures) -> Iterator[Check]:
    """States of any rank, in any precision, an empty batch, on the devices there are."""
    solver, eta, ground = subject.solver, subject.etas[-1], subject.ground
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

    def run(shape: tuple[int, ...], dtype: torch.dtype = DOUBLE, device: str = "cpu") -> Tensor:
        x = _numbers(shape).to(dtype=dtype, device=device)
        return subject.run(eta, 6, x, score=lambda x, t: -x.tanh(), seed=1)

    wrong = []
    flat = run(ground.shapes[0])
    for shape in ground.shapes[1:]:
        if not torch.allclose(run(shape), flat.reshape(shape), rtol=1e-6, atol=1e-6):
            wrong.append(f"a state of shape {shape} differs from {ground.shapes[0]}")
    for shape in (ground.nobody, ground.numbers):
        if shape and run(shape).shape != shape:
            wrong.append(f"a state of shape {shape} does not keep it")
    for device in devices:
        for dtype in DTYPES:
            x = run(ground.shapes[0], dtype, device)
            close = 0.1 if solver.adaptive or solver.stochastic else 200 * torch.finfo(dtype).eps
            if x.dtype != dtype or x.device.type != device or not bool(x.isfinite().all()):
                wrong.append(f"{dtype} on {device} gives {x.dtype} on {x.device}")
            elif eta == 0 and not solver.stochastic:
                if not torch.allclose(x.double().cpu(), flat, rtol=close, atol=close):
                    gap = float((x.double().cpu() - flat).abs().max())
                    wrong.append(f"{dtype} on {device} is off by {gap:.1e}")
    good = f"ranks, an empty batch, {len(DTYPES)} dtypes, {' and '.join(devices)}"
    yield Check("shapes, dtypes, devices", not wrong, "; ".join(wrong) or good)


@dataclass(frozen=True)
class _Coloured(GaussianSDE):
    """VP with a schedule for each of two components."""

    T: float = 1.0
    t_min: float = 1e-3

    def alpha(self, t: Tensor) -> Tensor:
        return torch.stack([sde.alpha(t) for sde in PARTS], -1)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.stack([sde.sigma(t) for sde in PARTS], -1)


PARTS = (VP(), VP(0.05, 10.0))


def refusals(subject: Subject, figures: Figures) -> Iterator[Check]:
    """A process that does not fit is refused before the first evaluation, or runs."""
    solver, calls = subject.solver, [0]

    def score(x: Tensor, t: Tensor) -> Tensor:
        calls[0] += 1
        return -x

    wrong, refused = [], 0
    processes: dict[str, Any] = {f"VP at eta = {e:g}": ReverseSDE(VP(), score, e) for e in ETAS}
    processes |= {f"CLD at eta = {e:g}": ReverseSDE(CLD(), score, e) for e in (0.0, 1.0)}
    processes |= {"a forward SDE": OU(), "no process": "vp"}
    up = torch.linspace(0.1, 0.9, 5, dtype=DOUBLE)
    for name, process in processes.items():
        calls[0] = 0
        ts = up.flip(0) if isinstance(process, ReverseSDE) else up
        x = torch.ones(2, 2, 3, dtype=DOUBLE)
        try:
            integrate(process, x, ts, solver, seed=0)
        except PairingError:
            refused += 1
            if calls[0]:
                wrong.append(f"{name} is refused after {calls[0]} evaluations")
        except (GridError, NonFiniteError, SolverError):
            pass
        else:
            if name == "no process":
                wrong.append("something that is no process is accepted")
    told = f"{refused} of {len(processes)} processes refused in time"
    yield Check("refusals", not wrong, "; ".join(wrong) or told)
    yield from _elementwise(subject)


def _elementwise(subject: Subject) -> Iterator[Check]:
    """Schedules of two components, where they are accepted, are each component's own."""
    solver = subject.solver
    eta = subject.etas[0 if solver.adaptive else -1]
    whole = ReverseSDE(_Coloured(), lambda x, t: -x, eta)
    try:
        solver.check(whole)
    except PairingError:
        return
    ts, x = torch.linspace(0.6, 0.02, 7, dtype=DOUBLE), torch.ones(2, 2, dtype=DOUBLE)

    def run(process: ReverseSDE, x: Tensor) -> Tensor:
        given: Any = {"noise": lambda t, s: 0.5 * x} if eta else {}
        return integrate(process, x, ts, solver, **given).x

    both = run(whole, x)
    alone = [run(ReverseSDE(sde, lambda x, t: -x, eta), x[:, :1]) for sde in PARTS]
    gap = float((both - torch.cat(alone, 1)).abs().max())
    close = 1e-2 if solver.adaptive else 1e-8
    yield Check("elementwise schedules", gap < close, f"{gap:.0e} from each component alone")


def host(subject: Subject, figures: Figures) -> Iterator[Check]:
    """No value of the state reaches the host in the loop: it runs on tensors without values."""
    solver, eta = subject.solver, subject.etas[-1]
    if not isinstance(solver, StepSolver) or solver.adaptive or subject.ground is not KERNELS:
        return
    x = torch.empty(2, 3, device="meta")
    process = subject.process(eta, lambda x, t: -x)
    try:
        for _ in solver.solve(process, x, subject.times(4, eta), lambda t, s: torch.empty_like(x)):
            pass
    except Exception as error:
        yield Check("no host synchronisation", False, str(error).split("\n")[0])
    else:
        yield Check("no host synchronisation", True, "runs on tensors without values")


def is_fused(subject: Subject) -> bool:
    """Whether the step is linear and runs from its tableau."""
    solver, eta = subject.solver, subject.etas[0]
    if not isinstance(solver, StepSolver):
        return False
    return trace(solver, subject.process(eta, lambda x, t: -x), subject.times(4, eta)) is not None


def non_finite(subject: Subject, figures: Figures) -> Iterator[Check]:
    """A score that breaks is reported with an error, never returned in silence."""
    middle = float(subject.times(8, subject.etas[0])[4])

    def broken(x: Tensor, t: Tensor) -> Tensor:
        late = as_time(t).to(x).reshape(-1, *[1] * (x.ndim - 1)) < middle
        return torch.where(late, math.nan, -x)

    for eta in subject.etas:
        try:
            subject.run(eta, 8, score=broken)
        except (NonFiniteError, SolverError) as error:
            yield Check(f"NaN in the score, eta = {eta:g}", True, str(error).split(";")[0])
        else:
            yield Check(f"NaN in the score, eta = {eta:g}", False, "returned in silence")
