"""DPM-Solver++ 1S, 2S and 2M, and their SDE variants: one formula, through eta.

With lambda = log(alpha/sigma), h = lambda_s - lambda_t and tau = eta, exactly:

    x_s = (sigma_s/sigma_t) e^{-tau^2 h} x_t + sigma_s sqrt(1 - e^{-2 tau^2 h}) z
          + alpha_s (1 + tau^2) INT e^{-(1 + tau^2)(lambda_s - lambda)} D(lambda) dlambda

On the probability flow (eta = 0) this is DPM-Solver++, on the reverse SDE SDE-DPM-Solver++.
Source: Lu et al. (2022b), DPM-Solver++, eq. 8, 9, 18 and algorithms 1, 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdeflow.errors import PairingError
from sdeflow.noise import Noise
from sdeflow.plugins import hookimpl
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import SDE, match
from sdeflow.solver import Memory, StepSolver


def half_log_snr_step(process: ReverseSDE, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """h = lambda_s - lambda_t; infinite where sigma_s = 0 or alpha_t = 0."""
    sde = process.gaussian
    return match((sde.log_snr(s) - sde.log_snr(t)) / 2, x, s + t)


def exponential_euler(
    process: ReverseSDE, x: Tensor, data: Tensor, t: Tensor, s: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of x_s for D frozen at `data` over the step."""
    (_, s_t), (a_s, s_s) = process.gaussian.kernel(x, t), process.gaussian.kernel(x, s)
    h, tau2 = half_log_snr_step(process, x, t, s), process.eta**2
    decay = torch.exp(-tau2 * h) if tau2 else torch.ones_like(h)
    mean = (s_s / s_t) * decay * x - a_s * torch.expm1(-(1 + tau2) * h) * data
    return mean, s_s * torch.sqrt(1 - decay**2)


@dataclass(frozen=True)
class DPMpp1S(StepSolver):
    """DPM-Solver++ 1S: D frozen at t, first order. DDIM on the probability flow and at eta = 1."""

    order = 1
    weak_order = 1
    evaluations = 1
    needs = ("gaussian",)

    def step(
        self, process: ReverseSDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise, memory: Memory
    ) -> tuple[Tensor, None]:
        mean, std = exponential_euler(process, x, process.denoise(x, t), t, s)
        return (mean if process.deterministic else mean + std * noise(t, s)), None


@dataclass(frozen=True)
class DPMpp2S(StepSolver):
    """DPM-Solver++ 2S: second order, single step, D taken at the middle of the step in lambda.

    The noise of the two halves is shared between the stage and the step, so that the weak order on
    SDEs is 2. A step from alpha = 0 or to sigma = 0, which has no middle, is of first order.
    """

    order = 2
    weak_order = 2
    evaluations = 2
    needs = ("gaussian",)

    def check(self, process: SDE) -> None:
        super().check(process)
        assert isinstance(process, ReverseSDE)
        if process.gaussian.alpha(torch.tensor(process.T, dtype=torch.float64)).ndim:
            raise PairingError(
                "DPMpp2S needs one alpha for all components; use DPMpp2M() or DDIM()"
            )

    def step(
        self, process: ReverseSDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise, memory: Memory
    ) -> tuple[Tensor, None]:
        sde = process.gaussian
        middle = (sde.log_snr(t) + sde.log_snr(s)) / 2
        if not middle.isfinite():
            return DPMpp1S().step(process, x, t, s, noise, memory)
        m = sde.time_of_log_snr(middle)
        stage, first_std = exponential_euler(process, x, process.denoise(x, t), t, m)
        if process.deterministic:
            return exponential_euler(process, x, process.denoise(stage, m), t, s)[0], None
        first = first_std * noise(t, m)
        data = process.denoise(stage + first, m)
        mean, _ = exponential_euler(process, x, data, t, s)
        carried, second_std = exponential_euler(process, first, 0.0 * data, m, s)
        return mean + carried + second_std * noise(m, s), None


@dataclass(frozen=True)
class DPMpp2M(StepSolver):
    """DPM-Solver++ 2M: second order, multistep, D extrapolated from the last two.

    To the middle of the step: D = D_t + (D_t - D_before) h/(2 h_before). The first step, and a
    step to sigma = 0, is of first order.
    """

    order = 2
    weak_order = 2
    evaluations = 1
    needs = ("gaussian",)

    def step(
        self, process: ReverseSDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        data = process.denoise(x, t)
        h = half_log_snr_step(process, x, t, s)
        extrapolated = data
        if memory is not None:
            before, h_before = memory
            ratio = torch.where(h.isfinite(), h / (2 * h_before), 0.0)
            extrapolated = data + ratio * (data - before)
        mean, std = exponential_euler(process, x, extrapolated, t, s)
        return (mean if process.deterministic else mean + std * noise(t, s)), (data, h)


@hookimpl
def sdeflow_solvers() -> dict[str, Callable[..., Any]]:
    return {"dpmpp_1s": DPMpp1S, "dpmpp_2s": DPMpp2S, "dpmpp_2m": DPMpp2M}
