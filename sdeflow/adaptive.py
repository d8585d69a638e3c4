"""`Adaptive`: a solver of SDEs and ODEs in which each sample chooses its own steps.

Every step is an interval of the grid halved some number of times, and begins at a multiple of its
own length; a step refused is halved, and steps grow by doubling. So the partitions are nested, and
no step passes over a time at which the path has been looked at already: with a Brownian path that
is the same whatever is refused, that is what makes the limit the solution.
Source: Gaines & Lyons (1997); Foster & Jelincic (2024).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .brownian import total_of
from .embedded import METHODS, Trial
from .errors import (
    ArgumentError,
    GridError,
    NonFiniteError,
    ShapeError,
    SolverError,
    positive_int,
)
from .noise import Noise, SeededNoise
from .sde import SDE, match
from .solver import Solver
from .tree import BrownianTree

PATIENCE = 256
"""After so many steps in which a sample's have not grown, what is left is reckoned up."""


@dataclass(frozen=True)
class Adaptive(Solver):
    """Steps chosen by each sample for itself, on any SDE and on ODEs.

    The method is what the process allows: order 3 on an ODE (Bogacki & Shampine), strong order 3/2
    on additive noise (SRA1), else Heun's in the Stratonovich sense, of strong order 1 where the
    noise commutes. A step is accepted where the root mean square of

        error / (atol + rtol max(|x|, |x_s|)),   over the components of the sample,

    is at most 1; the next are chosen by the mean of error/h^q over the last few. No sample looks at
    its batch, so each has the result that it has alone. The grid says where to report.

    rtol, atol: tolerances. dt_min: no step is shorter; a SolverError where one has to be.
    max_evaluations: of the whole batch. It gives up with a SolverError where they are spent, or
        where steps have long ceased to grow and twice as long ones would spend them: as an
        explicit method must on a stiff problem.
    The noise is a BrownianTree: one that is given, or BrownianTree(seed, shape, T = max ts). A
    refused step leaves the path as it was. Samples that are done are evaluated with the rest, so
    that scores see their whole batch, and do not move. The process is asked with t of shape (B,).
    """

    rtol: float = 1e-3
    atol: float = 1e-3
    dt_min: float = 0.0
    max_evaluations: int = 10_000

    order = 3
    weak_order = 2
    evaluations = math.nan
    adaptive = True
    calculus = "stratonovich"

    def __post_init__(self) -> None:
        positive_int("max_evaluations", self.max_evaluations)
        for name in ("rtol", "atol"):
            if not 0 < getattr(self, name) < 1:
                raise ArgumentError(
                    f"{name}={getattr(self, name)!r} must be in (0, 1), such as 1e-3"
                )
        if not 0 <= self.dt_min < math.inf:
            raise ArgumentError(f"dt_min={self.dt_min!r} must be a length of time >= 0")

    def solve(
        self, process: SDE, x: Tensor, ts: Tensor, noise: Noise
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if x.numel() == 0:
            yield from ((t, x) for t in ts[1:])
            return
        tree = None if process.deterministic else tree_of(noise, process.noise_shape(x), x, ts)
        shortest = max(self.dt_min, 2.0**-46 * float(ts.max()), tree.resolution if tree else 0.0)
        if float(ts.diff().abs().min()) < shortest:
            raise GridError(
                f"ts has steps of {float(ts.diff().abs().min()):.3g}, below the shortest that "
                f"this run resolves, {shortest:.3g}"
            )
        refuse_one_time(process, x, ts)
        run = _Run(self, process, x, ts, tree, shortest)
        for t, s in zip(ts[:-1], ts[1:], strict=True):
            run.carry(t, s)
            yield s, run.x


def tree_of(noise: Noise, shape: torch.Size, x: Tensor, ts: Tensor) -> BrownianTree:
    """The Brownian tree in `noise`, or that of its seed: BrownianTree(seed, shape, T = max ts)."""
    source = getattr(noise, "source", noise)  # under the driver's check of its shape
    if isinstance(source, SeededNoise):
        return BrownianTree(source.seed, shape, float(ts.max()), device=x.device)
    if not isinstance(source, BrownianTree):
        raise ArgumentError(
            f"noise={source!r} cannot be asked at times that each sample chooses, and again after "
            "a step is refused: give noise=BrownianTree(seed, shape, T), or a seed"
        )
    if source.shape != tuple(shape):
        raise ShapeError(
            f"noise is a BrownianTree of shape {source.shape}; this process needs {tuple(shape)}"
        )
    if source.T < float(ts.max()) * (1 - 1e-12):
        raise ArgumentError(
            f"noise is a BrownianTree of T = {source.T!r}, and the grid reaches t = "
            f"{float(ts.max())!r}: make it with the last time of the grid as its T"
        )
    return source


def refuse_one_time(process: SDE, x: Tensor, ts: Tensor) -> None:
    """Find a drift that lets times (B,) run along the last axis of x, where that has B components
    by accident. (Others fail, or give the wrong shape.)"""
    batch = x.shape[0]
    if x.ndim == 1 or batch == 1 or batch != x.shape[-1]:
        return
    times = torch.linspace(float(ts[0]), float(ts[1]), batch, dtype=torch.float64)
    every, one = (process.drift(x, t) for t in (times, times[1]))
    if every.shape != x.shape or not torch.allclose(every[1], one[1], rtol=1e-3, equal_nan=True):
        raise _one_time("is not that of each sample's own time", x, times)


def _one_time(said: str, x: Tensor, t: Tensor) -> ShapeError:
    return ShapeError(
        f"drift(x, t) {said}, for x of shape {tuple(x.shape)} and t of shape {tuple(t.shape)}: t "
        "is one time a sample here; let it multiply x as t.reshape(-1, *[1] * (x.ndim - 1)), or "
        "by sdeflow.sde.match(t, x)"
    )


class _Run:
    """The samples on their way: each at `place` steps of 1/2^level of the current interval."""

    def __init__(
        self,
        solver: Adaptive,
        process: SDE,
        x: Tensor,
        ts: Tensor,
        tree: BrownianTree | None,
        shortest: float,
    ) -> None:
        self.solver, self.process, self.x, self.tree = solver, process, x, tree
        self.shortest, self.last = shortest, float(ts[-1])
        self.calls = self.rounds = 0
        kind = "deterministic" if tree is None else "additive" if process.additive else "general"
        self.method = METHODS[kind]
        self.q = self.method.q
        batch = x.shape[0]
        self.home = torch.device("cpu") if x.device.type == "mps" else x.device
        self.step = torch.full((batch,), math.inf, dtype=torch.float64, device=self.home)
        self.mean = torch.zeros_like(self.step)  # of error/h^q
        self.past = torch.zeros_like(self.step)  # steps, some while ago
        self.taken = torch.zeros(batch, dtype=torch.int64, device=self.home)
        self.first: Tensor | None = None
        self.w = self.j = x.new_zeros(0)
        if tree is not None:
            self.w, self.j = tree.at(ts[0].expand(batch))

    def carry(self, start: Tensor, end: Tensor) -> None:
        """All samples from start to end."""
        span = abs(float(end - start))
        deepest = int(math.log2(span / self.shortest) + 1e-9)
        level = (span / self.step).log2().sub(1e-9).ceil().clamp(0, deepest).long()
        place = torch.zeros_like(level)
        one = torch.ones_like(level)
        start, end = start.to(self.home), end.to(self.home)
        while True:
            count = one << level
            active = place < count
            if not active.any():
                return
            t, s = (
                torch.where(at >= count, end, start + (end - start) * (at.double() / count))
                for at in (place, place + 1)
            )
            h = torch.where(active, (s - t).abs(), 1.0)
            self._reckon(t, h, active)
            trial, w, j = self._try(t, s)
            error = self._norm(trial)
            accept = active & (error <= 1)
            # NaN and infinity are no error of the step where the drift itself is not finite.
            self._check(trial, error, active & ~accept, level >= deepest, t, h)
            self._keep(trial, w, j, accept)
            change = self._change(error, accept, h)
            place = place + accept
            # Coarser steps begin at multiples of their own length.
            change = torch.where((place % 2 == 1) | (level == 0), change.clamp(max=0), change)
            change = torch.where(active, torch.maximum(change, level - deepest), 0)
            place = torch.where(change > 0, place >> 1, place << (-change).clamp(min=0))
            level = level - change
            self.step = torch.where(active, span / (one << level).double(), self.step)

    def _reckon(self, t: Tensor, h: Tensor, active: Tensor) -> None:
        """Give up where the evaluations are spent, or will be."""
        self.rounds += 1
        left = self.solver.max_evaluations - self.calls - self.method.stages - 1
        if left >= 0 and self.rounds % PATIENCE:
            return
        a_step = self.method.stages + (self.tree is not None)  # others know the first
        needed = (self.last - t).abs() / (2 * h) * a_step
        hopeless = active & (needed > left) & (h <= self.past)
        self.past = h
        if left >= 0 and not hopeless.any():
            return
        k = int(torch.where(active, needed, -1.0).argmax())
        raise SolverError(
            f"max_evaluations={self.solver.max_evaluations} do not suffice: after {self.calls} "
            f"sample {k} is at t={float(t[k]):.6g} of {self.last:.6g}, with steps of "
            f"{float(h[k]):.3g}; loosen rtol={self.solver.rtol} and atol={self.solver.atol}, end "
            "the grid earlier, or, if the problem is stiff, take a solver that is made for it"
        )

    def _try(self, t: Tensor, s: Tensor) -> tuple[Trial, Tensor, Tensor]:
        first = self._slope(t) if self.first is None else self.first
        self.calls += self.method.stages + (self.first is None)
        w, j = (self.w, self.j) if self.tree is None else self.tree.at(s)
        dw = area = w
        if self.tree is not None:
            h = match(s - t, w, t)
            dw = w - self.w
            area = (j - self.j - h * self.w) / torch.where(h == 0, 1.0, h) - dw / 2
            dw, area = (z.to(dtype=self.x.dtype, device=self.x.device) for z in (dw, area))
        return self.method.step(self.process, self.x, t, s, dw, area, first), w, j

    def _slope(self, t: Tensor) -> Tensor:
        """The drift at (x, t)."""
        try:
            first = self.process.drift(self.x, t)
        except RuntimeError as error:
            if "must match the size" not in str(error):
                raise
            raise _one_time(f"fails ({error})", self.x, t) from error
        if first.shape != self.x.shape:
            raise _one_time(f"has shape {tuple(first.shape)}", self.x, t)
        return first

    def _norm(self, trial: Trial) -> Tensor:
        """The error of each sample in units of its tolerance, (B,)."""
        solver = self.solver
        size = torch.maximum(self.x.detach().abs(), trial.x.detach().abs())
        ratio = trial.error.detach() / (solver.atol + solver.rtol * size)
        square = ratio.reshape(len(ratio), -1).to(self.home, torch.float64).square().T
        return (total_of(square) / len(square)).sqrt()

    def _check(
        self, trial: Trial, error: Tensor, refused: Tensor, deepest: Tensor, t: Tensor, h: Tensor
    ) -> None:
        """Find drifts that are not finite, and steps that cannot be halved."""
        lost = refused & ~error.isfinite()
        if lost.any():
            finite = trial.first.detach().isfinite().reshape(len(t), -1).all(1).to(self.home)
            lost = lost & (~finite | deepest)
            if lost.any():
                k = int(lost.nonzero()[0, 0])
                raise NonFiniteError(
                    f"the drift or the noise of sample {k} is not finite at t={float(t[k]):.6g}, "
                    f"in its step {int(self.taken[k]) + 1} (evaluation {self.calls}); check drift "
                    "and diffusion there, or the ends of the grid"
                )
        stuck = refused & deepest
        if stuck.any():
            k = int(stuck.nonzero()[0, 0])
            raise SolverError(
                f"sample {k} needs steps below {float(h[k]):.3g} at t="
                f"{float(t[k]):.6g}, the shortest there are (dt_min, or the resolution of the "
                f"Brownian tree): the solution runs off, or jumps; loosen rtol={self.solver.rtol} "
                f"and atol={self.solver.atol}, or end the grid before that time"
            )

    def _keep(self, trial: Trial, w: Tensor, j: Tensor, accept: Tensor) -> None:
        """Go on from the end of the steps accepted."""
        go = accept.to(self.x.device)
        self.x = torch.where(_beside(go, self.x), trial.x.to(self.x.dtype), self.x)
        if self.tree is not None:
            go = accept.to(w.device)
            self.w, self.j = (
                torch.where(_beside(go, w), a, b) for a, b in ((w, self.w), (j, self.j))
            )
        if trial.last is not None:
            self.first = torch.where(_beside(go, self.x), trial.last, trial.first)
        else:
            self.first = None if accept.any() else trial.first
        self.taken = self.taken + accept

    def _change(self, error: Tensor, accept: Tensor, h: Tensor) -> Tensor:
        """How many times each step is doubled (1) or halved (-1, -2, ...) for the next.

        One error is mostly the luck of its noise, and no ground to change the step; so steps go by
        the mean of error/h^q over the last few. (Following each error costs twice the steps.)
        """
        e, power = error.clamp(1e-9, 1e9).nan_to_num(nan=1e9), h**self.q
        weight = (self.taken == accept).to(e).clamp(min=self.method.weight)  # the first has all
        mean = torch.lerp(self.mean, e / power, weight)
        accepted = ((self.method.aim / mean) ** (1 / self.q) / h).log2().add(0.3).floor()
        refused = (0.9 * e ** (-1 / self.q)).log2().floor().clamp(-4, -1)
        # What a refused step says of shorter ones is that they fit.
        fitting = torch.maximum(self.mean, self.method.aim / (h * 2**refused) ** self.q)
        self.mean = torch.where(accept, mean, fitting)
        return torch.where(accept, accepted, refused).clamp(-4, 1).long()


def _beside(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (x.ndim - 1))
