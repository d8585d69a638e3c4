"""What a run may depend on, and what it must leave alone: batches, other runs, tensors, noise."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import PairingError
from ..noise import SeededNoise
from ..reverse import ReverseSDE
from ..sample import integrate, trajectory
from ..solver import StepSolver
from .behaviour import is_fused
from .ground import DOUBLE, KERNELS, Subject
from .report import Check

Figures = dict[str, Any]


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().nan_to_num(nan=float("inf")).max())


def batch(subject: Subject, figures: Figures) -> Iterator[Check]:
    """A sample is a function of its own start and seed, whoever its batch mates are."""
    solver, x = subject.solver, subject.ground.start(8)
    for eta in subject.etas[: 2 if solver.adaptive else None]:
        # One step size for a whole batch is allowed, within the tolerance.
        close = 1e-3 if solver.adaptive and not eta else 1e-9
        whole, first = (subject.run(eta, x=part) for part in (x, x[:3]))
        turned = subject.run(eta, x=x.flip(0), seed=list(range(8))[::-1])
        straight = subject.run(eta, x=x, seed=list(range(8)))
        gap = max(_gap(whole[:3], first), _gap(turned.flip(0), straight))
        told = "a prefix and a permutation give the same samples"
        if gap > 1e-9:
            told = f"samples change by {gap:.1e} with their batch mates"
        yield Check(f"batch, eta = {eta:g}", gap <= close, told)


def state(subject: Subject, figures: Figures) -> Iterator[Check]:
    """Two interleaved runs, and eight at once, are each what they are alone."""
    eta, starts = subject.etas[-1], [x[None] for x in subject.ground.start(8)]
    grids = [subject.times(5 + k, eta) for k in range(8)]

    def alone(k: int) -> Tensor:
        return integrate(subject.process(eta), starts[k], grids[k], subject.at(eta), seed=k).x

    expected = [alone(k) for k in range(8)]
    runs = [
        trajectory(subject.process(eta), starts[k], grids[k], subject.at(eta), seed=k)
        for k in (0, 1)
    ]
    last: list[Tensor] = [starts[0], starts[1]]
    running = [True, True]
    while any(running):
        for j, run in enumerate(runs):
            here = next(run, None)
            running[j] = here is not None
            last[j] = last[j] if here is None else here[1]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(alone, range(8)))
    gaps = map(_gap, [*last, *together], [*expected[:2], *expected])
    gap = max(gaps)
    yield Check("shared state", gap < 1e-12, f"interleaved and in 8 threads: {gap:.0e} from alone")


class _Kept:
    """A function that remembers what it returned, and how that was."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.answers: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        answer = self.function(x, t)
        self.answers.append((answer, answer.clone()))
        return answer

    def __getattr__(self, name: str) -> Any:  # of a noise: its `area`
        return getattr(self.function, name)

    @property
    def touched(self) -> bool:
        return any(not torch.equal(now, then) for now, then in self.answers)


def writes(subject: Subject, figures: Figures) -> Iterator[Check]:
    """Tensors are values: the start, the answers of the score, the noise and the states that were
    handed out stay as they were, in the fused run and in the loop."""
    x = subject.ground.start(4)
    before, found = x.clone(), []
    data = subject.ground.curved()
    for eta in subject.etas:
        for grad in (False, True):
            score = _Kept(data.denoise if hasattr(data, "denoise") else data)
            process = subject.process(eta, _Denoises(score) if hasattr(data, "denoise") else score)
            noise, ts = _Kept(_source(subject, process, x)), subject.times(6, eta)
            given = {"seed": 1} if subject.solver.adaptive else {"noise": noise}
            integrate(process, x, ts, subject.at(eta), grad=grad, **given)
            found += ["the answers of the score"] * score.touched
            found += ["the noise"] * noise.touched
        states = [
            (now, now.clone()) for _, now in trajectory(process, x, ts, subject.at(eta), seed=1)
        ]
        found += ["a state that was handed out"] * any(
            not torch.equal(now, then) for now, then in states
        )
    found += ["x, which is the caller's"] * (not torch.equal(x, before))
    told = f"the step writes into {found[0]}" if found else "the step leaves all tensors alone"
    yield Check("writes", not found, told)


class _Denoises:
    """An object that denoises, and is no score."""

    def __init__(self, denoise: Any) -> None:
        self.denoise = denoise


def _source(subject: Subject, process: ReverseSDE, x: Tensor) -> SeededNoise:
    noisy = not process.deterministic
    return SeededNoise(5, process.noise_shape(x) if noisy else x.shape, x.dtype)


def noise(subject: Subject, figures: Figures) -> Iterator[Check]:
    """The noise is that of the source, asked for the parts of the step and no part twice; torch's
    own generator is left alone, and the same seed gives the same samples."""
    eta, solver = subject.etas[1 if len(subject.etas) > 1 else 0], subject.solver
    generator = torch.get_rng_state()
    gap = _gap(subject.run(eta), subject.run(eta))
    moved = not torch.equal(generator, torch.get_rng_state())
    told = "torch's global generator is drawn from" if moved else f"repeats to {gap:.0e}"
    yield Check("seed", not moved and gap == 0, told)
    if solver.adaptive or solver.stochastic or not eta:
        return
    process, x, ts = subject.process(eta), subject.ground.start(2), subject.times(6, eta)
    source, asked = _source(subject, process, x), []

    class Recorder:
        def __call__(self, t: Tensor, s: Tensor) -> Tensor:
            asked.append((float(t), float(s)))
            return source(t, s)

        def area(self, t: Tensor, s: Tensor) -> Tensor:
            return source(t, s)

    integrate(process, x, ts, solver, noise=Recorder())
    wrong, knots, slack = [], ts.tolist(), 1 + 1e-9
    for t, s in asked:
        if not t > s:
            wrong.append(f"the interval ({t:.4g}, {s:.4g}) does not go down in time")
        elif not any(a * slack >= t and s * slack >= b for a, b in pairwise(knots)):
            wrong.append(f"the interval ({t:.4g}, {s:.4g}) is not inside a step")
    asked.sort(reverse=True)
    for (_, s), (t, _) in pairwise(asked):
        if t > s * slack:
            wrong.append(f"the noise at t = {t:.4g} is drawn twice")
    told = wrong[0] if wrong else f"{len(asked)} intervals in {len(ts) - 1} steps, none twice"
    yield Check("intervals of noise", not wrong, told)


def scores(subject: Subject, figures: Figures) -> Iterator[Check]:
    """A score, an object that denoises and a Denoiser of a network give the same samples."""
    if subject.ground is not KERNELS:
        return
    sde, data = subject.ground.sdes[0], subject.ground.curved()

    def net(x: Tensor, t: Tensor) -> Tensor:  # predicts the noise
        return -sde.kernel(x, t)[1] * data(x, t)

    faces = (data, lambda x, t: data(x, t), Denoiser(net, sde, "noise"))
    close = 1e-2 if subject.solver.adaptive else 1e-6
    for eta in subject.etas[:2]:
        first, *others = (subject.run(eta, score=face) for face in faces)
        gap = max(_gap(first, other) for other in others)
        told = f"score, denoiser and network agree to {gap:.0e}"
        yield Check(f"scores, eta = {eta:g}", gap < close, told)


def gradients(subject: Subject, figures: Figures) -> Iterator[Check]:
    """Gradients flow through the run: they are the slopes of its differences."""
    sde = subject.ground.sdes[0]
    data = subject.ground.gaussian(sde)
    x = sde.prior(torch.linspace(-1, 1, 2 * data.mean.numel()).double().reshape(2, -1))
    for eta in subject.etas[:2]:
        shift = torch.zeros((), dtype=DOUBLE, requires_grad=True)
        start = x.clone().requires_grad_()

        def moved(x: Tensor, c: Tensor, grad: bool = False, eta: float = eta) -> Tensor:
            process = subject.process(eta, lambda y, t: data(y, t) + c * y.cos(), sde)
            ts, each = subject.times(5, eta), range(2)
            return integrate(process, x, ts, subject.at(eta), seed=list(each), grad=grad).x.sum()

        try:
            found = torch.autograd.grad(
                moved(start, shift, True), (start, shift), materialize_grads=True
            )
        except PairingError:  # it says that it has none
            continue
        except RuntimeError as error:
            yield Check(f"gradients, eta = {eta:g}", False, str(error).split("\n")[0])
            continue
        step, zero = 1e-5, torch.zeros((), dtype=DOUBLE)
        pairs = ((x + step, zero, x - step, zero), (x, zero + step, x, zero - step))
        wanted = [(moved(*pair[:2]) - moved(*pair[2:])) / (2 * step) for pair in pairs]
        gap = max(
            float((a.sum() - b).abs() / (1 + b.abs())) for a, b in zip(found, wanted, strict=True)
        )
        close = 0.1 if subject.solver.adaptive else 1e-5
        yield Check(f"gradients, eta = {eta:g}", gap < close, f"{gap:.0e} from differences")


def tableau(subject: Subject, figures: Figures) -> Iterator[Check]:
    """Where a step is linear, the fused run has the numbers of the loop."""
    if not isinstance(subject.solver, StepSolver) or not is_fused(subject):
        return
    for eta in subject.etas:
        fused, loop = (subject.run(eta, 9, grad=grad) for grad in (False, True))
        gap = float(((fused - loop) / (1e-3 + loop.abs())).abs().max())
        yield Check(f"tableau, eta = {eta:g}", gap < 1e-10, f"{gap:.0e} from the plain loop")
