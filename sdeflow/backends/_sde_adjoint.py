"""Runs of torchsde's sdeint_adjoint, on its public interface. Loaded only when one is made."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torchsde import sdeint_adjoint

from ..derivatives import flat
from ..noise import Noise, SeededNoise, area
from ..sde import SDE
from ._torchsde import Clock, Increments, gives_fresh, more_draws, options, rescaled


def run(
    process: SDE,
    x: Tensor,
    ts: Tensor,
    noise: Noise,
    method: str,
    calculus: str,
    backwards: str | None,
    parameters: tuple[Tensor, ...],
    every: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The states of a run whose gradients come from the adjoint: all of them, or the last alone.

    One call of the library serves the whole grid. Only reversible Heun, which carries slopes over
    from step to step, takes one for each stretch of equal steps. On additive elementwise noise srk
    runs the scheme for elementwise noise here, of the same order: the library's cheaper one would
    want G as a matrix.
    """
    clock = Clock(process, x, ts, method, calculus)
    draws = draws_a_step(method, clock.noise_type, process.noise_shape(x)[-1])
    normals = Replayed(noise, ts, draws)
    increments = Increments(clock, normals, gives_fresh(noise))
    y, extra = flat(x), None
    for first, last in stretches(ts) if method == "reversible_heun" else [(0, len(ts) - 1)]:
        before = clock.h
        clock.enter(first)
        if extra is not None:
            extra = rescaled(extra, clock.h / before)
        nodes = range(first, last + 1) if every else (first, last)
        ys, extra = sdeint_adjoint(
            clock,
            y,
            torch.tensor(nodes, dtype=torch.float64),
            bm=increments,
            method=method,
            adjoint_method=backwards,
            dt=1.0,
            options=options(process, method),
            adjoint_params=parameters,
            extra=True,
            extra_solver_state=extra,
        )
        y = ys[-1]
        if every:
            for t, state in zip(ts[first + 1 : last + 1], ys[1:], strict=True):
                yield t, state.reshape(x.shape)
    if not every:
        yield ts[-1], y.reshape(x.shape)


def stretches(ts: Tensor) -> list[tuple[int, int]]:
    """(first node, last node) of each run of steps that are equal to rounding."""
    h = ts.diff()
    rounding = 8 * torch.finfo(ts.dtype).eps * float(ts.abs().max())
    found, first = [], 0
    for k in range(1, len(h) + 1):
        if k == len(h) or abs(float(h[k] - h[first])) > rounding:
            found.append((first, k))
            first = k
    return found


def draws_a_step(method: str, noise_type: str, m: int) -> int:
    """How many draws a step makes: the increment, its area, and what a Levy area takes."""
    if method == "log_ode" and noise_type == "general" and m > 1:
        return 2 + more_draws(m)
    return 2 if method == "srk" else 1


class Replayed:
    """The unit normals of every interval, the same whenever they are asked for, in any order.

    A SeededNoise gives the draws that it would give step by step, a first-class path its own; the
    draws of any other source are kept.
    """

    def __init__(self, noise: Noise, ts: Tensor, draws: int) -> None:
        self._noise, self._ts, self._draws = noise, ts, draws
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._first = noise.call if isinstance(noise, SeededNoise) else 0

    def __call__(self, k: int, draw: int) -> Tensor:
        noise = self._noise
        if isinstance(noise, SeededNoise):
            return noise.draw(self._first + k * self._draws + draw)
        t, s = self._ts[k], self._ts[k + 1]
        if not gives_fresh(noise):
            return area(noise, t, s) if draw else noise(t, s)
        if (k, draw) not in self._kept:
            self._kept[k, draw] = area(noise, t, s) if draw == 1 else noise(t, s)
        return self._kept[k, draw]
