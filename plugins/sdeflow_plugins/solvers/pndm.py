"""PNDM and iPNDM: Adams-Bashforth weights for equal steps, on the noise, along DDIM's step.

    x_s = alpha_s (x_t/alpha_t + (rho_s - rho_t) sum_j w_j eps_j),   rho = sigma/alpha

The weights assume equal steps in rho; on the graded grids in use the order is 2.
Source: Liu et al. (2022), PNDM, eq. 12 to 14; Zhang & Chen (2023), appendix H.2 (iPNDM).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sdeflow.errors import ArgumentError
from sdeflow.noise import Noise
from sdeflow.plugins import hookimpl
from sdeflow.reverse import ReverseSDE
from sdeflow.solver import Memory, StepSolver

from .dpmpp import exponential_euler, predicted_noise, third_order
from .ends import STARTS, check_ends, needs_of, values_in_use
from .multistep import Value, all_true

# fmt: off
ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
# fmt: on


@dataclass(frozen=True)
class PNDM(StepSolver):
    """Pseudo linear multistep on the noise.

    points: values of the noise in use, 1 to 4.
    start, last, reach: see `ends`; "grow" is iPNDM. Also "runge_kutta": four evaluations in each of
        the first steps (PNDM).
    A step from alpha = 0 is DDIM's, and its noise is not remembered; none of the four evaluations
    is made at sigma = 0, where a step uses as many values as there are.
    """

    points: int = 4
    start: str = "grow"
    last: str = "full"
    reach: float = 2.0

    evaluations = 1
    point_exact = True

    def __post_init__(self) -> None:
        if self.points not in ADAMS_BASHFORTH:
            raise ArgumentError(f"points={self.points!r} must be 1, 2, 3 or 4")
        check_ends(self.start, self.last, self.reach, (*STARTS, "runge_kutta"))

    @property
    def order(self) -> int:  # type: ignore[override]
        """2 on smoothly graded grids, whatever the number of points above one."""
        return min(2, self.points)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return needs_of(self.start, ("gaussian", "ode"))

    def init(self, process: ReverseSDE, x: Tensor, ts: Tensor) -> Memory:
        return (), len(ts) - 1

    def step(
        self, process: ReverseSDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        past, left = memory or ((), math.inf)
        sde, data = process.gaussian, process.denoise(x, t)
        if not all_true(sde.alpha(t) != 0):
            return exponential_euler(process, x, data, t, s)[0], (past, left - 1)
        eps = predicted_noise(sde, x, data, t)
        here, end = (sde.sigma(u) / sde.alpha(u) for u in (t, s))
        past = (Value(here, eps), *past)[: self.points]
        kept = past[: self.points - 1]
        if self.start != "grow" and len(past) < self.points and all_true(sde.sigma(s) != 0):
            if self.start == "single":
                return third_order(process, x, data, t, s), (kept, left - 1)
            slope = _runge_kutta(process, x, eps, t, s)
            return _transfer(process, x, slope, t, s), (kept, left - 1)
        behind = here - past[1].place if len(past) > 1 else None
        points = values_in_use(len(past), left, self.last, self.reach, end - here, behind)
        weights = ADAMS_BASHFORTH[points]
        slope = weights[0] * eps
        for weight, value in zip(weights[1:], past[1:points], strict=True):
            slope = slope + weight * value.value
        return _transfer(process, x, slope, t, s), (kept, left - 1)


def _transfer(process: ReverseSDE, x: Tensor, eps: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """DDIM's step along eps."""
    (a_t, s_t), (a_s, s_s) = process.gaussian.kernel(x, t), process.gaussian.kernel(x, s)
    return a_s / a_t * x + (s_s - a_s * s_t / a_t) * eps


def _runge_kutta(process: ReverseSDE, x: Tensor, first: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The pseudo Runge-Kutta mean of the noise: 1/6, 2/6, 2/6, 1/6; the middle in time."""
    total, slope = first, first
    for u, weight in (((t + s) / 2, 2.0), ((t + s) / 2, 2.0), (s, 1.0)):
        stage = _transfer(process, x, slope, t, u)
        slope = predicted_noise(process.gaussian, stage, process.denoise(stage, u), u)
        total = total + weight * slope
    return total / 6


@hookimpl
def sdeflow_solvers() -> dict[str, Callable[..., Any]]:
    return {
        "pndm": functools.partial(PNDM, 4, "runge_kutta"),
        **{f"ipndm_{k}": functools.partial(PNDM, k) for k in (1, 2, 3, 4)},
    }
