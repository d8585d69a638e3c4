"""DPM-Solver++ 1S, 2S and 2M, and their SDE variants: one formula, through eta.

With lambda = log(alpha/sigma), h = lambda_s - lambda_t and tau = eta, exactly:

    x_s = (sigma_s/sigma_t) e^{-tau^2 h} x_t + sigma_s sqrt(1 - e^{-2 tau^2 h}) z
          + alpha_s (1 + tau^2) INT e^{-(1 + tau^2)(lambda_s - lambda)} D(lambda) dlambda

On the probability flow (eta = 0) this is DPM-Solver++, on the reverse SDE SDE-DPM-Solver++.
Source: Lu et al. (2022b), DPM-Solver++, eq. 8, 9, 18 and algorithms 1, 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdeflow.noise import Noise
from sdeflow.plugins import hookimpl
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import GaussianSDE, match
from sdeflow.solver import Memory, StepSolver

from .ends import check_ends, needs_of, order_of, values_in_use


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


def predicted_noise(sde: GaussianSDE, x: Tensor, data: Tensor, t: Tensor) -> Tensor:
    """eps = (x - alpha D)/sigma."""
    a, s = sde.kernel(x, t)
    return (x - a * data) / s


@dataclass(frozen=True)
class DPMpp1S(StepSolver):
    """DPM-Solver++ 1S: D frozen at t, first order. DDIM on the probability flow and at eta = 1."""

    order = 1
    weak_order = 1
    evaluations = 1
    point_exact = True
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
    point_exact = True
    needs = ("gaussian", "one alpha")

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
class DPMpp3S(StepSolver):
    """DPM-Solver++ 3S: third order, single step, D taken at a third and at two thirds in lambda.

    An exponential Runge-Kutta method of Hochbruck and Ostermann. A step from alpha = 0 or to
    sigma = 0 is of first order.
    Source: Lu et al. (2022a, DPM-Solver), algorithm 2, with D for the noise; (2022b).
    """

    order = 3
    evaluations = 3
    point_exact = True
    needs = ("gaussian", "ode", "one alpha")

    def step(
        self, process: ReverseSDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise, memory: Memory
    ) -> tuple[Tensor, None]:
        return third_order(process, x, process.denoise(x, t), t, s), None


def third_order(process: ReverseSDE, x: Tensor, data: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """x_s by a step of DPM-Solver++ 3S, D known at t: two more evaluations."""
    sde = process.gaussian
    start, end = sde.log_snr(t), sde.log_snr(s)
    if not (start.isfinite() and end.isfinite()):
        return exponential_euler(process, x, data, t, s)[0]
    slope = 0.0 * data
    for part in (1 / 3, 2 / 3):  # D - D_t over the stage, by its slope in lambda
        m = sde.time_of_log_snr(start + part * (end - start))
        stage = linear_data(process, x, data, slope, t, m)
        slope = (process.denoise(stage, m) - data) / half_log_snr_step(process, x, t, m)
    return linear_data(process, x, data, slope, t, s)


def linear_data(
    process: ReverseSDE, x: Tensor, data: Tensor, slope: Tensor, t: Tensor, s: Tensor
) -> Tensor:
    """x_s on the probability flow for D = data + slope (lambda - lambda_t)."""
    mean, _ = exponential_euler(process, x, data, t, s)
    h = half_log_snr_step(process, x, t, s)
    return mean + process.gaussian.kernel(x, s)[0] * (h + torch.expm1(-h)) * slope


@dataclass(frozen=True)
class DPMpp2M(StepSolver):
    """DPM-Solver++ 2M: second order, multistep, D extrapolated from the last two.

    To the middle of the step: D = D_t + (D_t - D_before) h/(2 h_before). The first step, and a
    step to sigma = 0, is of first order. start, last, reach: see `ends`.
    """

    start: str = "grow"
    last: str = "full"
    reach: float = 2.0

    order = 2
    weak_order = 2
    evaluations = 1
    point_exact = True

    def __post_init__(self) -> None:
        check_ends(self.start, self.last, self.reach)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return needs_of(self.start, ("gaussian",))

    def init(self, process: ReverseSDE, x: Tensor, ts: Tensor) -> Memory:
        return None, len(ts) - 1

    def step(
        self, process: ReverseSDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        past, left = memory or (None, math.inf)
        data = extrapolated = process.denoise(x, t)
        h = half_log_snr_step(process, x, t, s)
        if past is None and self.start == "single":
            return third_order(process, x, data, t, s), ((data, h), left - 1)
        if past is not None:
            before, h_before = past
            if values_in_use(2, left, self.last, self.reach, h, h_before) == 2:
                ratio = torch.where(h.isfinite(), h / (2 * h_before), 0.0)
                extrapolated = data + ratio * (data - before)
        mean, std = exponential_euler(process, x, extrapolated, t, s)
        moved = mean if process.deterministic else mean + std * noise(t, s)
        return moved, ((data, h), left - 1)


@dataclass(frozen=True)
class DPMpp3M(StepSolver):
    """DPM-Solver++ 3M: third order, multistep, D as a parabola in lambda through the last three.

    published: use the coefficients of the authors' code, whose second difference is half of
        h^2 D'', and which are of second order; its second step is that of 2M. Otherwise the
        parabola is integrated exactly.
    start, last, reach: see `ends`. The first two steps are of orders 1 and 2, unless they are
    single ones; a step to sigma = 0 is of order 1.
    """

    published: bool = False
    start: str = "grow"
    last: str = "full"
    reach: float = 2.0

    weak_order = 2
    evaluations = 1
    point_exact = True

    def __post_init__(self) -> None:
        check_ends(self.start, self.last, self.reach)

    @property
    def order(self) -> int:  # type: ignore[override]
        """3; 2 with the published coefficients, or with last="lower"."""
        return order_of(2 if self.published else 3, self.start, self.last)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return needs_of(self.start, ("gaussian",))

    def init(self, process: ReverseSDE, x: Tensor, ts: Tensor) -> Memory:
        return (), len(ts) - 1

    def step(
        self, process: ReverseSDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        remembered, left = memory or ((), math.inf)
        past: tuple[Any, ...] = remembered
        data, h = process.denoise(x, t), half_log_snr_step(process, x, t, s)
        finite = bool(h.isfinite().all())
        kept = ((data, h), *past)[:2] if finite else ()
        if self.start == "single" and len(past) < 2:
            return third_order(process, x, data, t, s), (kept, left - 1)
        mean, std = exponential_euler(process, x, data, t, s)
        moved = mean if process.deterministic else mean + std * noise(t, s)
        behind = past[0][1] if past else None
        points = values_in_use(1 + len(past), left, self.last, self.reach, h, behind)
        if points > 1 and finite:
            rate = 1 + process.eta**2
            first, h_0 = data - past[0][0], past[0][1]
            slope = (1 / h_0) * first
            curvature = 0.0 * slope
            if points > 2:
                before, h_1 = (1 / past[1][1]) * (past[0][0] - past[1][0]), past[1][1]
                curvature = (2 / (h_0 + h_1)) * (slope - before)  # D''
                slope = slope + (h_0 / 2) * curvature
            decayed = torch.expm1(-rate * h)
            # INT (1 + tau^2) e^{-(1 + tau^2)(h - y)} y^k dy for k = 1, 2
            ramp = h + decayed / rate
            parabola = h**2 - 2 * ramp / rate
            a_s = process.gaussian.kernel(x, s)[0]
            share = 0.25 if self.published else 0.5
            if self.published and points == 2:  # as DPM-Solver++ 2M, the line at the middle
                ramp = -decayed * h / 2
            moved = moved + (a_s * ramp) * slope + (share * a_s * parabola) * curvature
        return moved, (kept, left - 1)


@hookimpl
def sdeflow_solvers() -> dict[str, Callable[..., Any]]:
    return {
        "dpmpp_1s": DPMpp1S,
        "dpmpp_2s": DPMpp2S,
        "dpmpp_3s": DPMpp3S,
        "dpmpp_2m": DPMpp2M,
        "dpmpp_3m": DPMpp3M,
    }
