"""The bundled forward SDEs, each with the defaults of its paper.

Names are the literature's; `T` is the last time and `t_min` where grids end by default.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .sde import SDE, GaussianSDE


@dataclass(frozen=True)
class VP(GaussianSDE):
    """Variance preserving, linear beta: dx = -beta/2 x dt + sqrt(beta) dw.

    alpha = exp(-B/2), sigma^2 = 1 - exp(-B), B(t) = beta_min t + (beta_max - beta_min) t^2/2.
    Source: Song et al. (2021, Score-SDE), eq. 11 and appendix B; the limit of DDPM's schedule.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    T: float = 1.0
    t_min: float = 1e-3

    def _integral(self, t: Tensor) -> Tensor:
        return t * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self._integral(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-self._integral(t)))

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        beta = self.beta_min + (self.beta_max - self.beta_min) * t
        return -0.5 * beta, beta

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        b = torch.nn.functional.softplus(-torch.as_tensor(log_snr, dtype=torch.float64))
        root = torch.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * b)
        return 2 * b / (self.beta_min + root)


@dataclass(frozen=True)
class SubVP(VP):
    """Sub-variance-preserving: alpha of VP, sigma = 1 - exp(-B), below VP's at every t.

    Source: Song et al. (2021, Score-SDE), eq. 12.
    """

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self._integral(t))

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        f, beta = super().rates(t)
        return f, -beta * torch.expm1(-2 * self._integral(t))

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return GaussianSDE.time_of_log_snr(self, log_snr)


@dataclass(frozen=True)
class VE(GaussianSDE):
    """Variance exploding: alpha = 1, sigma^2 = sigma_min^2 ((sigma_max/sigma_min)^(2t/T) - 1).

    Source: Song et al. (2021, Score-SDE), eq. 30; sigma(0) = 0 exactly.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    T: float = 1.0
    t_min: float = 1e-3

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        rate = 2 * math.log(self.sigma_max / self.sigma_min) / self.T
        return self.sigma_min * torch.sqrt(torch.expm1(rate * t))

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        rate = 2 * math.log(self.sigma_max / self.sigma_min) / self.T
        return torch.zeros_like(t), self.sigma_min**2 * rate * torch.exp(rate * t)


@dataclass(frozen=True)
class Cosine(GaussianSDE):
    """The cosine schedule: alpha = cos(pi/2 (t + s)/(1 + s)) / cos(pi/2 s/(1 + s)).

    Variance preserving. T = 0.9946 keeps log alpha finite, as in DPM-Solver (Lu et al., 2022a,
    appendix D.4). Source: Nichol & Dhariwal (2021), eq. 17.
    """

    s: float = 0.008
    T: float = 0.9946
    t_min: float = 1e-3

    def _angle(self, t: Tensor) -> Tensor:
        return math.pi / 2 * (t + self.s) / (1 + self.s)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(self._angle(t)) / math.cos(math.pi / 2 * self.s / (1 + self.s))

    def sigma(self, t: Tensor) -> Tensor:
        # 1 - alpha^2 as a product of sines: nothing cancels at small t.
        end, turn = math.pi / 2 * self.s / (1 + self.s), math.pi / 2 * t / (1 + self.s)
        return torch.sqrt(torch.sin(turn) * torch.sin(turn + 2 * end)) / math.cos(end)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        f = -math.pi / 2 / (1 + self.s) * torch.tan(self._angle(t))
        return f, -2 * f


@dataclass(frozen=True)
class EDM(GaussianSDE):
    """The process of EDM: alpha = 1, sigma = t, so that time is the noise level.

    Source: Karras et al. (2022, EDM), table 1.
    """

    T: float = 80.0
    t_min: float = 0.002

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-0.5 * torch.as_tensor(log_snr, dtype=torch.float64))


@dataclass(frozen=True)
class RectifiedFlow(GaussianSDE):
    """Rectified flow: alpha = 1 - t, sigma = t; with prediction="velocity", flow matching.

    At t = 1 alpha is 0: the probability flow is regular there, the noise of a reverse SDE is
    not (begin such a grid at t_max = 0.999). Source: Liu et al. (2023); Lipman et al. (2023).
    """

    T: float = 1.0
    t_min: float = 1e-3

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-0.5 * torch.as_tensor(log_snr, dtype=torch.float64))


@dataclass(frozen=True)
class OU(GaussianSDE):
    """Ornstein-Uhlenbeck: dx = -theta x dt + volatility dw, pulled to zero.

    alpha = exp(-theta t), sigma^2 = volatility^2 (1 - exp(-2 theta t)) / (2 theta), theta > 0.
    Source: Uhlenbeck & Ornstein (1930).
    """

    theta: float = 1.0
    volatility: float = 2**0.5
    T: float = 5.0
    t_min: float = 1e-3

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-self.theta * t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.volatility * torch.sqrt(-torch.expm1(-2 * self.theta * t) / (2 * self.theta))

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(t, -self.theta), torch.full_like(t, self.volatility**2)


@dataclass(frozen=True)
class GBM(SDE):
    """Geometric Brownian motion: dx = mu x dt + volatility x dw, elementwise.

    Not Gaussian: the noise depends on the state. log x_t = log x_0 + (mu - volatility^2/2) t +
    volatility w_t. Source: Black & Scholes (1973).
    """

    mu: float = 0.0
    volatility: float = 0.5
    T: float = 1.0
    noise: ClassVar = "elementwise"

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return self.mu * x

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return self.volatility * x
