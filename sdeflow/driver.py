"""One run of a solver: everything checked before the first evaluation, then the fastest road.

A step that is linear runs from its tableau; any other solver runs its own loop. Both yield the same
states.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import compiled, fused
from .calculus import in_calculus
from .errors import ArgumentError, GridError, NonFiniteError, PairingError, ShapeError, all_finite
from .grid import check_grid
from .noise import Noise, Seed, SeededNoise, area, check_seed, fresh_seed
from .reverse import ReverseSDE
from .sde import SDE, GaussianSDE
from .solver import Solver, StepSolver
from .tableau import Tableau, trace


@dataclass
class Run:
    """A process, a state, a grid and a solver that fit together, ready to go."""

    process: SDE
    x: Tensor
    ts: Tensor
    solver: Solver
    seed: Seed | None
    noise: Noise | None
    tableau: Tableau | None
    calls: list[int]

    @classmethod
    def prepare(
        cls,
        process: SDE,
        x: Tensor,
        ts: Any,
        solver: Solver | str,
        seed: Seed | None,
        noise: Noise | None,
        fuse: bool = True,
    ) -> Run:
        """Check everything that can be checked before the first evaluation."""
        if isinstance(solver, str):
            from .plugins import get

            solver = get("solver", solver)
        if not isinstance(solver, Solver):
            raise ArgumentError(f"solver={solver!r} must be a Solver, such as DDIM(), or a name")
        solver.check(process)
        process = in_calculus(process, solver.calculus)
        ts = _check_times(process, check_grid(ts))
        _check_state(x)
        if seed is not None and noise is not None:
            raise ArgumentError(
                "seed and noise are two sources of the same thing: give one of them"
            )
        if seed is None and noise is None:
            seed = fresh_seed()
        if seed is not None:
            check_seed(seed, x.shape[0])
        tableau = trace(solver, process, ts) if fuse and isinstance(solver, StepSolver) else None
        if tableau is None:
            _check_start(process, ts)
        return cls(process, x, ts, solver, seed, noise, tableau, [0])

    def states(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(t, x_t) after every step, from a fresh copy of the noise."""
        noise = self._source()
        if self.tableau is not None:
            assert isinstance(self.process, ReverseSDE)
            return fused.run(self.tableau, self.process, self.x, noise)
        self.calls[0] = 0
        return self.solver.solve(_counted(self.process, self.calls), self.x, self.ts, noise)

    def finish(self, final: list[Tensor], compile: bool = False) -> Iterator[Tensor]:
        """Run to the end, in reused buffers where it can be; the last state is put into `final`."""
        noise = self._source()
        if self.tableau is not None:
            assert isinstance(self.process, ReverseSDE)
            return fused.finish(self.tableau, self.process, self.x, noise, final)
        self.calls[0] = 0
        process = _counted(self.process, self.calls)
        if compile:
            given = (self.solver, self.process, process, self.calls)
            return compiled.finish(*given, self.x, self.ts, noise, final)
        return self.solver.finish(process, self.x, self.ts, noise, final)

    @property
    def steps(self) -> int:
        """The number of steps of the grid."""
        return len(self.ts) - 1

    @property
    def nfe(self) -> int:
        """Evaluations made so far."""
        return self.calls[0] if self.tableau is None else self.tableau.evaluations

    @torch.no_grad()
    def blame(self, step: int | None = None) -> None:
        """Raise the NonFiniteError: of the step given, or of the one found by running again, which
        a seed and a Brownian path (that has an `area`) allow."""
        again = self.seed is not None or self.process.deterministic or hasattr(self.noise, "area")
        if step is None and again:
            for k, (_, state) in enumerate(self.states()):
                if not all_finite(state):
                    step = k
                    break
        where = (
            "during the run (keep=True, or a noise that can be asked again, would tell the step)"
            if step is None
            else (
                f"at step {step + 1} of {self.steps}, from t={float(self.ts[step]):.6g} to "
                f"{float(self.ts[step + 1]):.6g}"
            )
        )
        raise NonFiniteError(
            f"the state became NaN or infinite {where} ({type(self.solver).__name__}); check the "
            "score there, or take smaller steps"
        )

    def _source(self) -> Noise:
        shape = self.process.noise_shape(self.x) if not self.process.deterministic else self.x.shape
        if self.noise is not None:
            return _Shaped(self.noise, shape, self.x)
        assert self.seed is not None
        return SeededNoise(self.seed, shape, self.x.dtype, self.x.device)


class _Shaped:
    """The noise given, its shape checked: one that broadcast would be shared among samples."""

    def __init__(self, source: Noise, shape: torch.Size, x: Tensor) -> None:
        self.source, self.shape, self.x = source, shape, x

    def __call__(self, t: Tensor, s: Tensor) -> Tensor:
        return self._checked("noise", self.source(t, s))

    def area(self, t: Tensor, s: Tensor) -> Tensor:
        """Unit normals of the space-time area."""
        return self._checked("noise.area", area(self.source, t, s))

    def _checked(self, name: str, z: Any) -> Tensor:
        if not isinstance(z, Tensor) or z.shape != self.shape:
            what = f"shape {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
            raise ShapeError(
                f"{name}(t, s) returned {what}; it must return unit normals of shape "
                f"{tuple(self.shape)}"
            )
        return z.to(dtype=self.x.dtype, device=self.x.device)


def _counted(process: SDE, calls: list[int]) -> SDE:
    """The process with its evaluations counted in calls[0]."""

    def count(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(x: Tensor, t: Tensor) -> Tensor:
            calls[0] += 1
            return function(x, t)

        counted.bare = function, calls  # type: ignore[attr-defined]  # for loops that count steps
        return counted

    if isinstance(process, ReverseSDE):
        return process.with_score(_CountedScore(process.score, count))
    process, drift = copy.copy(process), process.drift
    object.__setattr__(process, "drift", count(drift))
    return process


class _CountedScore:
    """A score, or a denoiser, that counts."""

    def __init__(self, score: Any, count: Callable[..., Any]) -> None:
        self._inner, self._score = score, count(score)
        if callable(getattr(score, "denoise", None)):
            self.denoise = count(score.denoise)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self._score(x, t)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _check_times(process: SDE, ts: Tensor) -> Tensor:
    first, last = float(ts[0]), float(ts[-1])
    if max(first, last) > process.T * (1 + 1e-12):
        raise GridError(f"ts reaches {max(first, last)!r}, beyond the last time T = {process.T!r}")
    down = last < first
    if process.direction > 0 and down:
        raise PairingError(
            f"ts decreases, and {type(process).__name__} is a forward SDE: to go back in time use "
            "reverse(sde, score) or probability_flow(sde, score)"
        )
    if process.direction < 0 and not down:
        raise PairingError(
            "ts increases, and a reverse SDE runs down in time; to carry data to noise use "
            "probability_flow(sde, score) (see encode), or the forward SDE itself"
        )
    return ts


def _check_start(process: SDE, ts: Tensor) -> None:
    """Refuse a start where the coefficients of a Gaussian process are infinite. (A tableau has
    been looked through already.)"""
    if not isinstance(process, ReverseSDE) or not isinstance(process.forward, GaussianSDE):
        return
    sde, t = process.forward, ts[0]
    rates = sde.slopes(t) if process.deterministic and process.denoises else sde.rates(t)
    if not all(bool(rate.isfinite().all()) for rate in rates):
        raise GridError(
            f"ts begins at t={float(t):.6g}, where the coefficients of this process are infinite "
            f"(alpha = {float(sde.alpha(t).min()):.3g}, sigma = {float(sde.sigma(t).min()):.3g}); "
            "begin a little inside: t_max=0.999 T when coming from noise, t_min > 0 from data"
        )


def _check_state(x: Any) -> None:
    if not isinstance(x, Tensor) or x.ndim < 1 or not x.is_floating_point():
        what = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise ShapeError(f"x is {what}; it must be a floating-point tensor of shape (B, *)")
    if not all_finite(x):
        raise NonFiniteError("x, the state to start from, holds NaN or infinite values")
