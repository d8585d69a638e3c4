"""EDM's sampler: Heun's method in sigma, with churn.

With y = x/alpha and rho = sigma/alpha: dy/drho = (y - D)/rho. Churn raises the noise level
to (1 + gamma) rho with fresh noise before a step, which keeps the marginals exactly; with
s_noise = 1 the weak order stays 2.
Source: Karras et al. (2022), EDM, algorithms 1 and 2.
"""

from __future__ import annotations

import functools
import math
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

from .dpmpp import exponential_euler


@dataclass(frozen=True)
class EDMHeun(StepSolver):
    """Heun's method in sigma/alpha, with the churn of EDM.

    churn: S_churn; gamma = min(churn/N, sqrt(2) - 1) for each of N steps. 0: deterministic.
    s_min, s_max: the range of sigma/alpha with churn; none goes beyond T.
    s_noise: standard deviation of the noise added; EDM's 1.003 and 1.007 leave the marginals on
        purpose.
    Runs on the probability flow and brings its own noise. A step to sigma = 0, or from alpha = 0,
    is Euler's (DDIM): 2N - 1 evaluations.
    """

    churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    order = 2
    evaluations = 2
    needs = ("gaussian", "ode", "one alpha")

    def __post_init__(self) -> None:
        for name in ("churn", "s_min", "s_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ArgumentError(f"{name}={getattr(self, name)!r} must be finite and >= 0")
        if not self.s_max >= self.s_min:
            raise ArgumentError(f"s_max={self.s_max!r} must be at least s_min={self.s_min!r}")

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether it adds noise to the probability flow."""
        return self.churn > 0

    @property
    def point_exact(self) -> bool:  # type: ignore[override]
        """True unless there is noise, and it is scaled."""
        return self.s_noise == 1 or not self.churn

    def init(self, process: ReverseSDE, x: Tensor, ts: Tensor) -> Memory:
        return min(self.churn / (len(ts) - 1), math.sqrt(2) - 1)

    def step(
        self, process: ReverseSDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        sde, gamma = process.gaussian, memory
        rho = torch.exp(-sde.log_snr(t) / 2)
        if gamma and bool(rho.isfinite() & (rho >= self.s_min) & (rho <= self.s_max)):
            highest = torch.exp(-sde.log_snr(torch.tensor(sde.T, dtype=torch.float64)) / 2)
            if bool((1 + gamma) * rho <= highest):  # the network knows no higher level
                raised = sde.time_of_log_snr(-2 * torch.log((1 + gamma) * rho))
                (a_t, s_t), (a_r, _) = sde.kernel(x, t), sde.kernel(x, raised)
                kick = math.sqrt((1 + gamma) ** 2 - 1) * self.s_noise * s_t / a_t
                x, t = (a_r / a_t) * x + a_r * kick * noise(s, t), raised
        data = process.denoise(x, t)
        stage = exponential_euler(process, x, data, t, s)[0]
        (a_t, s_t), (a_s, s_s) = sde.kernel(x, t), sde.kernel(x, s)
        if not bool((a_t > 0) & (s_s > 0)):
            return stage, memory
        first = (x - a_t * data) / s_t
        second = (stage - a_s * process.denoise(stage, s)) / s_s
        h = s_s / a_s - s_t / a_t
        return (a_s / a_t) * x + (a_s * h / 2) * (first + second), memory


@hookimpl
def sdeflow_solvers() -> dict[str, Callable[..., Any]]:
    return {"edm_heun": EDMHeun, "edm_churn": functools.partial(EDMHeun, churn=40.0)}
