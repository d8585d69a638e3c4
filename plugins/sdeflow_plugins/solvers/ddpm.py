"""DDPM: ancestral sampling, for every Gaussian SDE, with three variances.

Source: Ho, Jain & Abbeel (2020), Denoising Diffusion Probabilistic Models, section 3.2; Bao et al.
(2022), Analytic-DPM, theorem 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdeflow.denoiser import Denoiser
from sdeflow.errors import ArgumentError, one_of
from sdeflow.noise import Noise, SeededNoise
from sdeflow.plugins import hookimpl
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import as_time, match
from sdeflow.solver import Memory, StepSolver


@dataclass(frozen=True)
class DDPM(StepSolver):
    """DDPM: ancestral sampling, the Markov chain that undoes the noising.

    x_s ~ N(mean of q(x_s | x_t, x_0 = D), v)

    variance: "small", v = sigma_s^2 (1 - e^{-2h}), the posterior's own, exact for one-point data;
        "large", v = sigma_t^2 (1 - e^{-2h}): beta_t for VP, sigma_t^2 - sigma_s^2 for VE;
        "analytic", the small one and the mean's share of the variance of x_0 given x_t, the best
        there is, exact for isotropic Gaussian data.
    power: t -> E |eps|^2 a component, of the noise predicted at time t; "analytic" needs it, and
        `noise_power` measures it.
    Here e^{-h} = (alpha_t sigma_s)/(alpha_s sigma_t). A step to sigma = 0 adds no noise.
    """

    variance: str = "small"
    power: Callable[[Tensor], Tensor] | None = None

    weak_order = 1
    evaluations = 1
    needs = ("gaussian", "eta=1")

    def __post_init__(self) -> None:
        one_of("variance", self.variance, ("small", "large", "analytic"))
        if (self.power is not None) != (self.variance == "analytic"):
            raise ArgumentError(
                f"variance={self.variance!r} with power={self.power!r}: power, E |eps|^2 a "
                "component as a function of time, goes with 'analytic' alone; measure it with "
                "noise_power(denoiser, x0, ts)"
            )

    @property
    def point_exact(self) -> bool:  # type: ignore[override]
        """Whether the variance is that of one point."""
        return self.variance == "small"

    def step(
        self, process: ReverseSDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise, memory: Memory
    ) -> tuple[Tensor, None]:
        sde = process.gaussian
        mean, std = sde.posterior(x, process.denoise(x, t), t, s)
        (a_t, s_t), (a_s, s_s) = sde.kernel(x, t), sde.kernel(x, s)
        shrunk = -torch.expm1(-match(sde.log_snr(s) - sde.log_snr(t), x, s + t))  # 1 - e^{-2h}
        if self.variance == "large":
            std = torch.where(s_s > 0, s_t * torch.sqrt(shrunk), 0.0)
        if self.power is not None and bool((a_t > 0).all()):
            left = (1 - self.power(t).clamp(0, 1)) * (s_t / a_t) ** 2  # of x_0 given x_t
            share = torch.where(s_s > 0, a_s * shrunk, 0.0)  # of D in the mean
            std = torch.sqrt(std**2 + share**2 * left)
        return mean + std * noise(t, s), None


def noise_power(
    denoiser: Denoiser, x0: Tensor, ts: Tensor, seed: int = 0
) -> Callable[[Tensor], Tensor]:
    """t -> E |eps|^2 a component, for the analytic variance, measured on data at the times ts.

    denoiser: a Denoiser; x0: data (B, *); ts: the times of the grid to be used. The function
    returned knows these times, and interpolates between them linearly in log-SNR.
    Source: Bao et al. (2022), eq. 9 (Gamma_n = E |score|^2 / d; here sigma^2 Gamma).
    """
    sde = denoiser.sde
    source = SeededNoise(seed, x0.shape, x0.dtype, x0.device)
    times = as_time(ts)[as_time(sde.sigma(as_time(ts))) > 0].sort().values
    with torch.no_grad():
        power = torch.stack(
            [denoiser.noise(sde.perturb(x0, t, source(t, t)), t).square().mean() for t in times]
        ).to(device="cpu", dtype=torch.float64)
    if len(times) == 1:
        return lambda t: power[0]
    places = sde.log_snr(times).clamp(-1e3, 1e3)

    def interpolated(t: Tensor) -> Tensor:
        place = sde.log_snr(t).clamp(-1e3, 1e3)
        after = (places > place).sum().clamp(1, len(places) - 1)  # log-SNR falls with time
        part = (place - places[after - 1]) / (places[after] - places[after - 1])
        return torch.lerp(power[after - 1], power[after], part.clamp(0, 1))

    return interpolated


@hookimpl
def sdeflow_solvers() -> dict[str, Callable[..., Any]]:
    return {"ddpm": DDPM, "ddpm_large": functools.partial(DDPM, variance="large")}
