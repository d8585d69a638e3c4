"""The bundled forward SDEs, each with the defaults of its paper.

Names are the literature's; `T` is the last time and `t_min` where grids end by default.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .errors import ArgumentError
from .sde import SDE, GaussianSDE, as_time, match
from .system import LinearSystem


def _double(number: Tensor | float) -> Tensor:
    return torch.as_tensor(number, dtype=torch.float64)


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
        return self._time(torch.nn.functional.softplus(-_double(log_snr)))

    def _time(self, b: Tensor) -> Tensor:
        """The t with B(t) = b."""
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
        # sigma/alpha = 2 sinh(B/2)
        return self._time(2 * torch.asinh(torch.exp(-_double(log_snr) / 2) / 2))


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

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        rate = 2 * math.log(self.sigma_max / self.sigma_min) / self.T
        return torch.log1p(torch.exp(-_double(log_snr)) / self.sigma_min**2) / rate


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

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        # angle = turn + end, of which sin^2(angle) - sin^2(end) = (sigma cos(end))^2 is known.
        end = math.pi / 2 * self.s / (1 + self.s)
        c, s = math.cos(end), math.sin(end)
        squared = c**2 * torch.sigmoid(-_double(log_snr))
        sine, cosine = torch.sqrt(squared + s**2), c * torch.sigmoid(_double(log_snr)).sqrt()
        turn = torch.atan2(squared / (sine * c + cosine * s), cosine * c + sine * s)
        return turn * (2 * (1 + self.s) / math.pi)


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
        return torch.exp(-0.5 * _double(log_snr))


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
        return torch.sigmoid(-0.5 * _double(log_snr))


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

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        ratio = 2 * self.theta / self.volatility**2
        return torch.log1p(ratio * torch.exp(-_double(log_snr))) / (2 * self.theta)


Rows = Sequence[Sequence[float]]


@dataclass(frozen=True)
class MatrixOU(LinearSystem):
    """Coupled Ornstein-Uhlenbeck processes: dX = -theta (X - center) dt + volatility dw.

    theta (d, d), volatility (d, m), center (d,) (None: zero): rows of numbers; states (B, d, *).
    Source: Gardiner (2009), Stochastic Methods, section 4.5.6.
    """

    theta: Rows = ((1.0, 0.5), (-0.5, 1.0))
    volatility: Rows = ((1.0, 0.0), (0.5, 1.0))
    center: Sequence[float] | None = None
    T: float = 5.0
    t_min: float = 1e-3
    constant: ClassVar = True

    def F(self, t: Tensor) -> Tensor:
        return -torch.as_tensor(self.theta, dtype=torch.float64)

    def G(self, t: Tensor) -> Tensor:
        return torch.as_tensor(self.volatility, dtype=torch.float64)

    def c(self, t: Tensor) -> Tensor | None:
        if self.center is None:
            return None
        return -self.F(t) @ torch.as_tensor(self.center, dtype=torch.float64)


@dataclass(frozen=True)
class CLD(LinearSystem):
    """Critically damped Langevin diffusion: data are positions, noise enters through velocities.

    dx = (beta/M) v dt,   dv = -beta x dt - (Gamma beta/M) v dt + sqrt(2 Gamma beta) dw
    with mass M; friction Gamma, 2 sqrt(M) (critical damping) by default; and v_0 ~ N(0, gamma M).
    The state is (B, 2, *), x[:, 0] the position: see `lift` and `data`. It ends near
    N(0, I) x N(0, M I). Source: Dockhorn, Vahdat & Kreis (2022), eq. 5; defaults of their CIFAR-10.
    """

    beta: float = 4.0
    mass: float = 0.25
    friction: float | None = None
    gamma: float = 0.04
    T: float = 1.0
    t_min: float = 1e-3
    constant: ClassVar = True

    def __post_init__(self) -> None:
        for name in ("beta", "mass", "friction", "gamma"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ArgumentError(f"{name}={value!r} must be finite and > 0")
        super().__post_init__()

    @property
    def _damping(self) -> float:
        return 2 * math.sqrt(self.mass) if self.friction is None else self.friction

    def F(self, t: Tensor) -> Tensor:
        b, speed = self.beta, self.beta / self.mass
        return torch.tensor([[0.0, speed], [-b, -self._damping * speed]], dtype=torch.float64)

    def G(self, t: Tensor) -> Tensor:
        kick = math.sqrt(2 * self._damping * self.beta)
        return torch.tensor([[0.0], [kick]], dtype=torch.float64)

    def start(self) -> Tensor:
        return torch.tensor([[0.0, 0.0], [0.0, self.gamma * self.mass]], dtype=torch.float64)

    def lift(self, x0: Tensor) -> Tensor:
        """The state (B, 2, *) of data (B, *): at rest (`start` has the spread of velocities)."""
        return torch.stack((x0, torch.zeros_like(x0)), 1)

    def data(self, x: Tensor) -> Tensor:
        """The positions (B, *) of states (B, 2, *)."""
        return x[:, 0]


@dataclass(frozen=True)
class BrownianBridge(SDE):
    """The Brownian bridge: Brownian motion bound to be at `end` at time T.

    dx = (end - x)/(T - t) dt + volatility dw. Given x_s, x_t is normal with mean
    x_s + (end - x_s) (t - s)/(T - s) and variance volatility^2 (t - s)(T - t)/(T - s): `moments`.
    The drift is singular at T, where Euler-Maruyama may end a grid: the path arrives at `end` up to
    the noise of the last step. Source: Karatzas & Shreve (1991), section 5.6.B.
    end: a number, or a tensor that broadcasts against x.
    """

    end: float | Tensor = 0.0
    volatility: float = 1.0
    T: float = 1.0
    additive: ClassVar[bool] = True

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return (self.end - x) / match(self.T - t, x, t)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(t, self.volatility)[(...,) + (None,) * (x.ndim - 1) * t.ndim]

    def moments(
        self, x: Tensor, t: Tensor | float, s: Tensor | float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance of x_t given x_s = x, s < T."""
        t, s = as_time(t), as_time(s)
        gone = (t - s) / (self.T - s)
        variance = self.volatility**2 * gone * (self.T - t)
        return x + match(gone, x, s + t) * (self.end - x), match(variance, x, s + t)

    def perturb(self, x0: Tensor, t: Tensor | float, noise: Tensor) -> Tensor:
        """x_t given x_0, for unit normals of the shape of x0."""
        mean, variance = self.moments(x0, t)
        return mean + variance.sqrt() * noise
