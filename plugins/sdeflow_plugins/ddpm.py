"""DDPM: ancestral sampling, for every Gaussian SDE.

Source: Ho, Jain & Abbeel (2020), Denoising Diffusion Probabilistic Models, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdeflow.errors import one_of
from sdeflow.noise import Noise
from sdeflow.plugins import hookimpl
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import match
from sdeflow.solver import Memory, StepSolver


@dataclass(frozen=True)
class DDPM(StepSolver):
    """DDPM: ancestral sampling, the Markov chain that undoes the noising.

    x_s ~ N(mean of q(x_s | x_t, x_0 = D), v)

    variance: "small", v = sigma_s^2 (1 - e^{-2h}), the posterior's own, exact for one-point data;
        "large", v = sigma_t^2 (1 - e^{-2h}): beta_t for VP, sigma_t^2 - sigma_s^2 for VE.
    Here e^{-h} = (alpha_t sigma_s)/(alpha_s sigma_t). A step to sigma = 0 adds no noise.
    """

    variance: str = "small"

    weak_order = 1
    evaluations = 1
    needs = ("gaussian", "eta=1")

    def __post_init__(self) -> None:
        one_of("variance", self.variance, ("small", "large"))

    def step(
        self, process: ReverseSDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise, memory: Memory
    ) -> tuple[Tensor, None]:
        sde = process.gaussian
        mean, std = sde.posterior(x, process.denoise(x, t), t, s)
        if self.variance == "large":
            two_h = match(sde.log_snr(s) - sde.log_snr(t), x, s + t)
            s_t, s_s = sde.kernel(x, t)[1], sde.kernel(x, s)[1]
            std = torch.where(s_s > 0, s_t * torch.sqrt(-torch.expm1(-two_h)), 0.0)
        return mean + std * noise(t, s), None


@hookimpl
def sdeflow_solvers() -> dict[str, Callable[..., Any]]:
    return {"ddpm": DDPM}
