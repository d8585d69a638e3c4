"""PNDM and iPNDM: Adams-Bashforth weights for equal steps, on the noise, along DDIM's step.

    x_s = alpha_s (x_t/alpha_t + (rho_s - rho_t) sum_j w_j eps_j),   rho = sigma/alpha

The weights assume equal steps in rho; on the graded grids in use the order is 2.
Source: Liu et al. (2022), PNDM, eq. 12 to 14; Zhang & Chen (2023), appendix H.2 (iPNDM).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sdeflow.errors import ArgumentError, one_of
from sdeflow.noise import Noise
from sdeflow.plugins import hookimpl
from sdeflow.reverse import ReverseSDE
from sdeflow.solver import Memory, StepSolver

from .dpmpp import exponential_euler, predicted_noise
from .multistep import all_true

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
    start: "grow", with as many values as there are (iPNDM); "runge_kutta", four evaluations in
        each of the first steps (PNDM).
    A step from alpha = 0 is DDIM's, and its noise is not remembered; none of the four evaluations
    is made at sigma = 0, where a step uses as many values as there are.
    """

    points: int = 4
    start: str = "grow"

    evaluations = 1
    point_exact = True
    needs = ("gaussian", "ode")

    def __post_init__(self) -> None:
        if self.points not in ADAMS_BASHFORTH:
            raise ArgumentError(f"points={self.points!r} must be 1, 2, 3 or 4")
        one_of("start", self.start, ("grow", "runge_kutta"))

    @property
    def order(self) -> int:  # type: ignore[override]
        """2 on smoothly graded grids, whatever the number of points above one."""
        return min(2, self.points)

    def step(
        self, process: ReverseSDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        sde, past, data = process.gaussian, memory or (), process.denoise(x, t)
        if not all_true(sde.alpha(t) != 0):
            return exponential_euler(process, x, data, t, s)[0], past
        eps = predicted_noise(sde, x, data, t)
        past = (eps, *past)[: self.points]
        starts = self.start == "runge_kutta" and len(past) < self.points
        if starts and all_true(sde.sigma(s) != 0):
            return _transfer(process, x, _runge_kutta(process, x, eps, t, s), t, s), past
        weights = ADAMS_BASHFORTH[len(past)]
        slope = weights[0] * past[0]
        for weight, value in zip(weights[1:], past[1:], strict=True):
            slope = slope + weight * value
        return _transfer(process, x, slope, t, s), past[: self.points - 1]


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
