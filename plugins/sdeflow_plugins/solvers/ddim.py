"""DDIM: the non-Markov family of samplers, through eta, for every Gaussian SDE.

Source: Song, Meng & Ermon (2021), Denoising Diffusion Implicit Models, eq. 12 and 16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sdeflow.noise import Noise
from sdeflow.plugins import hookimpl
from sdeflow.reverse import ReverseSDE
from sdeflow.solver import Memory, StepSolver


@dataclass(frozen=True)
class DDIM(StepSolver):
    """DDIM: the non-Markov step to x_s through the predicted data D, for any eta.

    x_s = alpha_s D + sqrt(sigma_s^2 - v) eps + sqrt(v) z,   v = eta^2 sigma_s^2 (1 - e^{-2h})
    eta is the process's: probability_flow is the deterministic DDIM (and exponential Euler),
    reverse is DDPM with the small variance. The form of v holds for VE too, where the usual print
    gives zero. Keeps the marginals of one-point data exactly, at any eta on any grid.
    """

    order = 1
    weak_order = 1
    evaluations = 1
    point_exact = True
    needs = ("gaussian",)

    def step(
        self, process: ReverseSDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise, memory: Memory
    ) -> tuple[Tensor, None]:
        mean, std = process.gaussian.posterior(x, process.denoise(x, t), t, s, process.eta)
        if process.deterministic:
            return mean, None
        return mean + std * noise(t, s), None


@hookimpl
def sdeflow_solvers() -> dict[str, Callable[..., Any]]:
    return {"ddim": DDIM}
