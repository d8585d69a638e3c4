"""SEEDS: stochastic exponential Runge-Kutta on the noise prediction.

With h = lambda_s - lambda_t and tau = eta, exactly:

    x_s = (alpha_s/alpha_t) x_t - (1 + tau^2) alpha_s INT e^-lambda eps dlambda
          + tau sigma_s sqrt(e^{2h} - 1) z

The noise of a stage is that of the step up to there: drawn in pieces and carried on.
Source: Gonzalez et al. (2023), SEEDS, algorithms 1 to 3.
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

from .dpmpp import exponential_euler, half_log_snr_step


@dataclass(frozen=True)
class SEEDS(StepSolver):
    """SEEDS with 1, 2 or 3 stages. On the probability flow it is DPM-Solver of that order.

    Weak order 1, 2 and 2. Along a path of an SDE eps is not constant even for one-point data, whose
    law it keeps on the probability flow alone. A step from alpha = 0 or to sigma = 0 is DDIM's.
    """

    stages: int = 2

    needs = ("gaussian", "one alpha")

    def __post_init__(self) -> None:
        if self.stages not in (1, 2, 3):
            raise ArgumentError(f"stages={self.stages!r} must be 1, 2 or 3")

    @property
    def order(self) -> int:  # type: ignore[override]
        """The number of stages."""
        return self.stages

    @property
    def weak_order(self) -> int:  # type: ignore[override]
        """1 for one stage, otherwise 2."""
        return min(2, self.stages)

    @property
    def evaluations(self) -> int:  # type: ignore[override]
        """The number of stages."""
        return self.stages

    def step(
        self, process: ReverseSDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise, memory: Memory
    ) -> tuple[Tensor, None]:
        sde, data = process.gaussian, process.denoise(x, t)
        start, end = sde.log_snr(t), sde.log_snr(s)
        if not (start.isfinite() and end.isfinite()):
            mean, std = exponential_euler(process, x, data, t, s)
            return (mean if process.deterministic else mean + std * noise(t, s)), None
        rate = 1 + process.eta**2

        def noise_at(x: Tensor, data: Tensor, u: Tensor) -> Tensor:
            a, sigma = sde.kernel(x, u)
            return (x - a * data) / sigma

        def moved(slope: Any, held: Tensor, kick: Any, u: Tensor) -> Tensor:
            """x_u for eps = held + slope (lambda - lambda_t), and the noise so far."""
            (a_t, _), (a_u, s_u) = sde.kernel(x, t), sde.kernel(x, u)
            h = half_log_snr_step(process, x, t, u)
            grown = torch.expm1(h)
            return (a_u / a_t) * x - rate * s_u * (grown * held + (grown - h) * slope) + a_u * kick

        def kicked(kick: Any, u: Tensor, v: Tensor) -> Any:
            """The noise from t to v over alpha, given that from t to u."""
            if process.deterministic:
                return kick
            spread = torch.exp(-sde.log_snr(u)) - torch.exp(-sde.log_snr(v))
            return kick + process.eta * spread.sqrt() * noise(u, v)

        eps = noise_at(x, data, t)
        parts = {1: (), 2: (1 / 2,), 3: (1 / 3, 2 / 3)}[self.stages]
        slope, kick, at = 0.0 * eps, 0.0 * eps, t
        for part in parts:
            m = sde.time_of_log_snr(start + part * (end - start))
            kick, at = kicked(kick, at, m), m
            stage = moved(slope, eps, kick, m)
            inner = noise_at(stage, process.denoise(stage, m), m)
            if self.stages == 2:
                eps = inner
            else:
                slope = (inner - eps) / half_log_snr_step(process, x, t, m)
        return moved(slope, eps, kicked(kick, at, s), s), None


@hookimpl
def sdeflow_solvers() -> dict[str, Callable[..., Any]]:
    return {f"seeds_{k}": functools.partial(SEEDS, k) for k in (1, 2, 3)}
