"""Drivers: `trajectory`, `integrate`, `sample`, `encode`, and the `Solution` they return.

sampler = process x solver x grid. A step that is linear runs from its tableau, by itself, with the
numbers of the plain loop.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import fused
from .errors import ArgumentError, GridError, NonFiniteError, PairingError, ShapeError, all_finite
from .grid import check_grid
from .noise import Noise, Seed, SeededNoise, fresh_seed, start
from .reverse import ReverseSDE
from .sde import SDE, GaussianSDE
from .solver import Solver, StepSolver
from .tableau import Tableau, trace


@dataclass(frozen=True)
class Solution:
    """The result of an integration.

    x: the final state (B, *). ts: the grid, (N+1,) float64. nfe: evaluations of the score (of the
    drift, for a process without one), each for the whole batch. seed: what the noise was drawn
    from, None if it was given. fused: whether it ran from a tableau. path: (N+1, B, *), with keep.
    """

    x: Tensor
    ts: Tensor
    nfe: int
    seed: Seed | None
    fused: bool
    path: Tensor | None = None

    def __repr__(self) -> str:
        return (
            f"Solution(x={tuple(self.x.shape)} {self.x.dtype}, steps={len(self.ts) - 1}, "
            f"nfe={self.nfe}, seed={self.seed}, fused={self.fused})"
        )


@torch.no_grad()
def trajectory(
    process: SDE,
    x: Tensor,
    ts: Any,
    solver: Solver | str,
    *,
    seed: Seed | None = None,
    noise: Noise | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (t, x_t) after every step: progress, previews and early stopping are your own `for`.

    process: reverse(sde, score), probability_flow(sde, score), or a forward SDE.
    x: the state at ts[0], (B, *). ts: strictly monotone times, down for a reverse process, up for
    a forward one, either way for an ODE. solver: an object or a registered name.
    seed: an int, or one int a sample; None draws one from the operating system. noise: a source of
    unit normals (t, s) -> z instead of a seed.
    A non-finite state raises a NonFiniteError at its step.
    """
    run = _Run.prepare(process, x, ts, solver, seed, noise)
    for k, (t, state) in enumerate(run.states()):
        if not all_finite(state):
            run.blame(k)
        yield t, state


def integrate(
    process: SDE,
    x: Tensor,
    ts: Any,
    solver: Solver | str,
    *,
    seed: Seed | None = None,
    noise: Noise | None = None,
    keep: bool = False,
    grad: bool = False,
    progress: bool = False,
) -> Solution:
    """Carry x along the grid and return the `Solution`. Arguments as for `trajectory`, and

    keep: also return the states at all times. grad: let gradients flow to x and to the score's
    parameters through the plain loop. progress: show a bar.
    The end is checked for non-finite values; if there are any, the step where they arose is named.
    """
    with nullcontext() if grad else torch.no_grad():
        run = _Run.prepare(process, x, ts, solver, seed, noise, fuse=not grad)
        if keep or run.tableau is None:
            path = [x]
            for _, state in _bar(run.states(), run.steps) if progress else run.states():
                path = [*path, state] if keep else [state]
        else:
            path = []
            done = run.finish(path)
            for _ in _bar(done, run.steps) if progress else done:
                pass
        if not all_finite(path[-1]):
            run.blame()
    kept = torch.stack(path) if keep else None
    return Solution(path[-1], run.ts, run.nfe, run.seed, run.tableau is not None, kept)


def sample(
    process: ReverseSDE,
    shape: Sequence[int],
    *,
    solver: Solver | str = "dpmpp_2m",
    steps: int = 20,
    grid: str | Callable[..., Tensor] | Tensor = "log_snr",
    seed: Seed | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    keep: bool = False,
    progress: bool = False,
) -> Solution:
    """Samples from noise: x_T from the prior, carried to the end of the grid.

    process: reverse(sde, score) or probability_flow(sde, score) of a Gaussian SDE.
    shape: of the batch, (B, *). solver: an object or a registered name. grid: a name, a function
    (sde, n) -> times, or the times. steps: of the grid. seed: an int, or one int a sample (sample
    i then depends on seed[i] alone); None draws one, which the Solution tells.
    """
    if not isinstance(process, ReverseSDE):
        raise PairingError(
            f"process={process!r} must be a reverse process: reverse(sde, score) or "
            "probability_flow(sde, score)"
        )
    ts = make_grid(process, grid, steps)
    _check_shape(shape)
    seed = fresh_seed() if seed is None else seed
    x = process.gaussian.prior(start(seed, shape, dtype, torch.device(device)), ts[0])
    return integrate(process, x, ts, solver, seed=seed, keep=keep, progress=progress)


def encode(
    process: ReverseSDE,
    x0: Tensor,
    *,
    solver: Solver | str = "ddim",
    steps: int = 50,
    grid: str | Callable[..., Tensor] | Tensor = "log_snr",
    keep: bool = False,
) -> Solution:
    """Data to noise along the probability flow: the inverse of `sample`, on the grid run upwards.

    The grid must end at a time > 0 (sigma = 0 has no noise to read); x0 is the state there.
    """
    if not isinstance(process, ReverseSDE) or not process.deterministic:
        raise PairingError(
            "encode runs the probability flow, which alone can be run both ways: give it "
            "probability_flow(sde, score)"
        )
    ts = make_grid(process, grid, steps).flip(0)
    if ts[0] == 0:
        raise GridError(
            "encode: the grid reaches t = 0, where sigma = 0; use one that ends at t_min > 0"
        )
    return integrate(process, x0, ts, solver, keep=keep)


def make_grid(
    process: ReverseSDE, grid: str | Callable[..., Tensor] | Tensor | Sequence[float], steps: int
) -> Tensor:
    """Decreasing times for a reverse process from a name, a function (sde, n) or the times."""
    if isinstance(grid, str):
        from .plugins import get

        grid = get("grid", grid)
    ts = check_grid(grid(process.forward, steps) if callable(grid) else grid)
    if ts[0] < ts[-1]:
        raise GridError(
            f"grid: times must decrease, from noise to data; they go {ts[0]} to {ts[-1]}"
        )
    return ts


# ---- one run


@dataclass
class _Run:
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
    ) -> _Run:
        """Check everything that can be checked before the first evaluation."""
        if isinstance(solver, str):
            from .plugins import get

            solver = get("solver", solver)
        if not isinstance(solver, Solver):
            raise ArgumentError(f"solver={solver!r} must be a Solver, such as DDIM(), or a name")
        solver.check(process)
        ts = _check_times(process, check_grid(ts))
        _check_state(x)
        if seed is not None and noise is not None:
            raise ArgumentError(
                "seed and noise are two sources of the same thing: give one of them"
            )
        if seed is None and noise is None:
            seed = fresh_seed()
        if seed is not None:
            SeededNoise(seed, x.shape)  # refuses a wrong seed now
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

    def finish(self, final: list[Tensor]) -> Iterator[Tensor]:
        """Run the tableau to the end in reused buffers; the last state is put into `final`."""
        assert self.tableau is not None and isinstance(self.process, ReverseSDE)
        return fused.finish(self.tableau, self.process, self.x, self._source(), final)

    @property
    def steps(self) -> int:
        """The number of steps of the grid."""
        return len(self.ts) - 1

    @property
    def nfe(self) -> int:
        """Evaluations made so far."""
        return self.calls[0] if self.tableau is None else self.tableau.evaluations

    def blame(self, step: int | None = None) -> None:
        """Raise the NonFiniteError: of the step given, or of the one found by running again."""
        if step is None and self.seed is not None:
            for k, (_, state) in enumerate(self.states()):
                if not all_finite(state):
                    step = k
                    break
        where = (
            "during the run"
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
        if self.noise is not None:
            return self.noise
        assert self.seed is not None
        shape = self.process.noise_shape(self.x) if not self.process.deterministic else self.x.shape
        return SeededNoise(self.seed, shape, self.x.dtype, self.x.device)


def _counted(process: SDE, calls: list[int]) -> SDE:
    """The process with its evaluations counted in calls[0]."""

    def count(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*args: Any, **kwargs: Any) -> Tensor:
            calls[0] += 1
            return function(*args, **kwargs)

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


def _check_shape(shape: Sequence[int]) -> None:
    if (
        isinstance(shape, int)
        or not len(shape)
        or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in shape)
    ):
        raise ShapeError(
            f"shape={shape!r} must be a tuple (B, *) of whole numbers, such as (16, 1, 8, 8)"
        )


def _bar(states: Iterator[Any], steps: int) -> Iterator[Any]:
    from tqdm.auto import tqdm

    return iter(tqdm(states, total=steps, unit="step"))
