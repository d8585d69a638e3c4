"""DPM-Solver: exponential Runge-Kutta and Adams methods on the noise prediction.

With h = lambda_s - lambda_t and eps = eps_t + slope (lambda - lambda_t) over the step,

    x_s = (alpha_s/alpha_t) x_t - sigma_s (e^h - 1) eps_t - sigma_s (e^h - 1 - h) slope

Source: Lu et al. (2022a), DPM-Solver, eq. 3.6 to 3.7, algorithms 1 and 2, appendix B.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdeflow.errors import ArgumentError
from sdeflow.noise import Noise
from sdeflow.plugins import hookimpl
from sdeflow.reverse import ReverseSDE
from sdeflow.solver import Memory, StepSolver

from .dpmpp import exponential_euler, half_log_snr_step, predicted_noise
from .multistep import Multistep


@dataclass(frozen=True)
class DPMSolver(StepSolver):
    """DPM-Solver, single step: order 1, 2 (the noise at the middle in lambda) or 3 (at thirds).

    Of first order (DDIM) in a step from alpha = 0 or to sigma = 0.
    """

    degree: int = 2

    def __post_init__(self) -> None:
        if self.degree not in (1, 2, 3):
            raise ArgumentError(f"degree={self.degree!r} must be 1, 2 or 3")

    point_exact = True
    needs = ("gaussian", "ode", "one alpha")

    @property
    def order(self) -> int:  # type: ignore[override]
        """The degree."""
        return self.degree

    @property
    def evaluations(self) -> int:  # type: ignore[override]
        """As many as the degree."""
        return self.degree

    def step(
        self, process: ReverseSDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise, memory: Memory
    ) -> tuple[Tensor, None]:
        sde, data = process.gaussian, process.denoise(x, t)
        start, end = sde.log_snr(t), sde.log_snr(s)
        if self.degree == 1 or not (start.isfinite() and end.isfinite()):
            return exponential_euler(process, x, data, t, s)[0], None
        eps = predicted_noise(sde, x, data, t)
        slope = 0.0 * eps
        for part in (1 / 2,) if self.degree == 2 else (1 / 3, 2 / 3):
            m = sde.time_of_log_snr(start + part * (end - start))
            stage = _linear_noise(process, x, eps, slope, t, m)
            inner = predicted_noise(sde, stage, process.denoise(stage, m), m)
            if self.degree == 2:
                return _linear_noise(process, x, inner, slope, t, s), None
            slope = (inner - eps) / half_log_snr_step(process, x, t, m)
        return _linear_noise(process, x, eps, slope, t, s), None


def _linear_noise(
    process: ReverseSDE, x: Tensor, eps: Tensor, slope: Tensor, t: Tensor, s: Tensor
) -> Tensor:
    (a_t, _), (a_s, s_s) = process.gaussian.kernel(x, t), process.gaussian.kernel(x, s)
    h = half_log_snr_step(process, x, t, s)
    grown = torch.expm1(h)
    return (a_s / a_t) * x - s_s * grown * eps - s_s * (grown - h) * slope


def multistep(points: int = 2, **options: Any) -> Multistep:
    """DPM-Solver multistep: the noise as a polynomial in lambda, integrated exactly."""
    return Multistep("noise", "log_snr", points, **options)


@hookimpl
def sdeflow_solvers() -> dict[str, Callable[..., Any]]:
    single = {f"dpm_solver_{k}": functools.partial(DPMSolver, k) for k in (1, 2, 3)}
    return single | {f"dpm_solver_{k}m": functools.partial(multistep, k) for k in (2, 3)}
