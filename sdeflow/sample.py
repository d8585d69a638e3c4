"""Drivers: `trajectory`, `integrate`, `sample`, `encode`, and the `Solution` they return.

sampler = process x solver x grid. A step that is linear runs from its tableau, by itself, with the
numbers of the plain loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .driver import Run
from .errors import ArgumentError, GridError, PairingError, ShapeError, all_finite
from .grid import check_grid
from .noise import Noise, Seed, fresh_seed, start
from .reverse import ReverseSDE
from .sde import SDE
from .solver import Solver
from .system import LinearSystem


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
    run = Run.prepare(process, x, ts, solver, seed, noise)
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
    compile: bool = False,
    progress: bool = False,
) -> Solution:
    """Carry x along the grid and return the `Solution`. Arguments as for `trajectory`, and

    keep: also return the states at all times. grad: let gradients flow to x and to the score's
    parameters through the plain loop. progress: show a bar.
    compile: run fifty steps at a time in one graph of torch.compile, which takes some seconds to
    make, once for every solver, process and shape of x: for many steps of small states. The numbers
    are the same up to rounding.
    The end is checked for non-finite values; if there are any, the step where they arose is named.
    """
    with nullcontext() if grad else torch.no_grad():
        if compile and (keep or grad):
            raise ArgumentError(
                f"compile=True gives the last state alone, without gradients: leave out "
                f"{'keep' if keep else 'grad'}=True, or compile=True"
            )
        run = Run.prepare(process, x, ts, solver, seed, noise, fuse=not (grad or compile))
        if keep:
            path = [x]
            for _, state in _bar(run.states(), run.steps) if progress else run.states():
                path.append(state)
        else:
            path = []
            done = run.finish(path, compile)
            for _ in _bar(done, run.steps) if progress else done:
                pass
        if not all_finite(path[-1]):
            run.blame([all_finite(state) for state in path[1:]].index(False) if keep else None)
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

    process: reverse(sde, score) or probability_flow(sde, score) of a Gaussian SDE, or of
    a LinearSystem (with its solvers, such as "gddim", and the grid "uniform").
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
    if not dtype.is_floating_point:
        raise ShapeError(f"dtype={dtype} must be a floating-point one, such as torch.float32")
    seed = fresh_seed() if seed is None else seed
    forward = process.forward if isinstance(process.forward, LinearSystem) else process.gaussian
    x = forward.prior(start(seed, shape, dtype, torch.device(device)), ts[0])
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


def _check_shape(shape: Sequence[int]) -> None:
    if (
        not isinstance(shape, Sequence)
        or not len(shape)
        or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in shape)
    ):
        raise ShapeError(
            f"shape={shape!r} must be a tuple (B, *) of whole numbers, such as (16, 1, 8, 8)"
        )


def _bar(states: Iterator[Any], steps: int) -> Iterator[Any]:
    from tqdm.auto import tqdm

    return iter(tqdm(states, total=steps, unit="step"))
