"""Restart sampling: now and then back up in noise, and down again by the ODE.

After the step that passes a level rho_low, K times: fresh noise up to rho_high, which is exact in
law, and the ODE down again. The errors made above are contracted.
Source: Xu et al. (2023), Restart sampling, algorithm 2 and table 3 (levels).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdeflow.errors import ArgumentError, GridError
from sdeflow.grid import karras
from sdeflow.noise import Noise
from sdeflow.plugins import hookimpl
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import SDE, GaussianSDE
from sdeflow.solver import Memory, StepSolver

from .ancestral import check_inner, one_step
from .edm import EDMHeun

Interval = tuple[float, float, int, int]


@dataclass(frozen=True)
class Restart(StepSolver):
    """Restart on the probability flow, with any deterministic one-step solver inside.

    intervals: (low, high, times, steps): levels of sigma/alpha, how often, and in how many steps of
        the Karras grid; steps = 0 takes as many as the grid itself has between the two. A level
        `low` that the grid does not pass is left out.
    inner: the one-step solver of the ODE.
    """

    intervals: tuple[Interval, ...] = ((0.06, 0.3, 4, 0),)
    inner: StepSolver = field(default_factory=EDMHeun)

    stochastic = True
    needs = ("gaussian", "ode", "one alpha")

    def __post_init__(self) -> None:
        for low, high, times, steps in self.intervals:
            if not (0 < low < high and times >= 1 and steps >= 0):
                raise ArgumentError(
                    f"intervals has {(low, high, times, steps)!r}; an entry is (low, high, times, "
                    "steps) with 0 < low < high, times >= 1 and steps >= 0"
                )
        check_inner(self.inner)

    @property
    def order(self) -> float | None:  # type: ignore[override]
        """That of the solver inside."""
        return self.inner.order

    @property
    def evaluations(self) -> float:  # type: ignore[override]
        """Those of the solver inside, in a step that passes no level."""
        return self.inner.evaluations

    @property
    def point_exact(self) -> bool:  # type: ignore[override]
        """Whether the solver inside is."""
        return self.inner.point_exact

    def check(self, process: SDE) -> None:
        super().check(process)
        self.inner.check(process)

    def init(self, process: ReverseSDE, x: Tensor, ts: Tensor) -> Memory:
        levels = torch.exp(-process.gaussian.log_snr(ts) / 2)
        return tuple(
            steps or max(1, int(((levels > low) & (levels <= high)).sum()))
            for low, high, _, steps in self.intervals
        )

    def step(
        self, process: ReverseSDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        sde = process.gaussian
        x = one_step(self.inner, process, x, t, s, noise)
        above, below = (torch.exp(-sde.log_snr(u) / 2) for u in (t, s))
        for (low, high, times, _), steps in zip(self.intervals, memory, strict=True):
            if not below <= low < above:
                continue
            top = sde.time_of_log_snr(-2 * torch.tensor(high, dtype=torch.float64).log())
            if not s < top <= sde.T:
                raise GridError(
                    f"intervals: the level {high} is at t={float(top):.4g}, beyond the last time "
                    f"T = {sde.T:.4g} or below the step's end; choose a lower or higher one"
                )
            ts = self._way_down(sde, top, s, low, steps)
            for _ in range(times):
                (a_s, s_s), (a_h, s_h) = sde.kernel(x, s), sde.kernel(x, top)
                spread = torch.sqrt(s_h**2 - (a_h / a_s * s_s) ** 2)
                x = self._run(process, (a_h / a_s) * x + spread * noise(s, top), ts, noise)
        return x, memory

    def _way_down(self, sde: GaussianSDE, top: Tensor, s: Tensor, low: float, steps: int) -> Tensor:
        """The Karras grid from the top to s; to sigma = 0 by way of the level `low`."""
        if bool(sde.sigma(s) > 0):
            return karras(sde, steps, t_max=float(top), t_min=float(s))
        bottom = sde.time_of_log_snr(-2 * torch.tensor(low, dtype=torch.float64).log())
        return karras(sde, steps, t_max=float(top), t_min=float(bottom), to_zero=True)

    def _run(self, process: ReverseSDE, x: Tensor, ts: Tensor, noise: Noise) -> Tensor:
        for t, s in zip(ts[:-1], ts[1:], strict=True):
            x = one_step(self.inner, process, x, t, s, noise)
        return x


@hookimpl
def sdeflow_solvers() -> dict[str, Callable[..., Any]]:
    return {"restart": Restart}
