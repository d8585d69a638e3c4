"""RES: second-order exponential Runge-Kutta that meets the stiff order conditions.

On D, with the stage at c h in lambda and phi_2(-h) = (h + e^-h - 1)/h^2:

    x_s = (sigma_s/sigma_t) x_t - alpha_s (e^-h - 1) D_t + alpha_s h^2 phi_2(-h) (D_m - D_t)/(c h)

Source: Zhang et al. (2023), Improved order analysis and design of exponential integrator (RES),
eq. 13; the multistep RES is the exponential Adams method on D, `eab_data_2`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sdeflow.errors import ArgumentError
from sdeflow.noise import Noise
from sdeflow.plugins import hookimpl
from sdeflow.reverse import ReverseSDE
from sdeflow.solver import Memory, StepSolver

from .dpmpp import exponential_euler, half_log_snr_step, linear_data


@dataclass(frozen=True)
class RES2S(StepSolver):
    """RES, single step, second order. c: where in the step, in lambda, the stage is, in (0, 1].

    A step from alpha = 0 or to sigma = 0 is of first order.
    """

    c: float = 0.5

    order = 2
    evaluations = 2
    point_exact = True
    needs = ("gaussian", "ode", "one alpha")

    def __post_init__(self) -> None:
        if not 0 < self.c <= 1:
            raise ArgumentError(f"c={self.c!r} must be in (0, 1]")

    def step(
        self, process: ReverseSDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise, memory: Memory
    ) -> tuple[Tensor, None]:
        sde, data = process.gaussian, process.denoise(x, t)
        start, end = sde.log_snr(t), sde.log_snr(s)
        if not (start.isfinite() and end.isfinite()):
            return exponential_euler(process, x, data, t, s)[0], None
        m = sde.time_of_log_snr(start + self.c * (end - start))
        stage = exponential_euler(process, x, data, t, m)[0]
        slope = (process.denoise(stage, m) - data) / half_log_snr_step(process, x, t, m)
        return linear_data(process, x, data, slope, t, s), None


@hookimpl
def sdeflow_solvers() -> dict[str, Callable[..., Any]]:
    return {"res_2s": RES2S}
