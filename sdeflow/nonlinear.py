"""Forward SDEs without a Gaussian kernel, each with the closed forms that it has.

`score` methods are exact; partial(sde.score, ...) is what reverse(sde, score) wants. Parameters may
be tensors, to be fitted by gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import ArgumentError, ShapeError
from .sde import SDE, as_time, match


@dataclass(frozen=True)
class GBM(SDE):
    """Geometric Brownian motion: dx = mu x dt + volatility x dw, elementwise.

    log x_t = log x_0 + (mu - volatility^2/2) t + volatility w_t, for x_0 of either sign.
    Source: Black & Scholes (1973).
    """

    mu: float = 0.0
    volatility: float = 0.5
    T: float = 1.0
    noise: ClassVar = "elementwise"

    def __post_init__(self) -> None:
        _check(self, "volatility")

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return self.mu * x

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return self.volatility * x

    def divergence(self, x: Tensor, t: Tensor) -> Tensor:
        return (2 * self.volatility**2) * x

    def perturb(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t from x_0, exactly, for unit normals of the shape of x0."""
        t = match(as_time(t), x0)
        rate = self.mu - self.volatility**2 / 2
        return x0 * torch.exp(rate * t + self.volatility * t.sqrt() * noise)

    def moments(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of x_t given x_0."""
        t = match(as_time(t), x0)
        mean = x0 * torch.exp(self.mu * t)
        return mean, mean**2 * torch.expm1(self.volatility**2 * t)

    def score(self, x: Tensor, t: Tensor, mean: Any = 0.0, std: Any = 0.0) -> Tensor:
        """grad log p_t(x), x > 0, where log x_0 ~ N(mean, std^2); std = 0 is the transition from
        x_0 = exp(mean)."""
        t = match(as_time(t), x)
        center = mean + (self.mu - self.volatility**2 / 2) * t
        return -(1 + (x.log() - center) / (std**2 + self.volatility**2 * t)) / x


@dataclass(frozen=True)
class CIR(SDE):
    """Cox-Ingersoll-Ross: dx = kappa (theta - x) dt + xi sqrt(x) dw, elementwise, x >= 0.

    Zero is never reached where 2 kappa theta >= xi^2 (Feller). A numerical path that oversteps it
    meets no noise there, and its drift brings it back, forward and reversed.
    x_0 ~ Gamma(2 kappa theta/xi^2, scale) has a gamma law for good, its scale going to
    xi^2/(2 kappa), the stationary one. Source: Cox, Ingersoll & Ross (1985); Feller (1951).
    """

    kappa: float = 1.0
    theta: float = 1.0
    xi: float = 0.5
    T: float = 1.0

    def __post_init__(self) -> None:
        _check(self, "kappa", "theta", "xi")

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return self.kappa * (self.theta - x)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return self.xi * x.clamp_min(0).sqrt()

    def covariance_product(self, x: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """xi^2 x v, continued to x < 0: there x score(x) must not vanish, or paths that overstep
        zero in reverse would be lost."""
        return self.xi**2 * x * v

    def divergence(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.ones_like(x) * self.xi**2

    def moments(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of x_t given x_0."""
        t = match(as_time(t), x0)
        kept, lost = torch.exp(-self.kappa * t), -torch.expm1(-self.kappa * t)
        variance = self.xi**2 / self.kappa * lost * (x0 * kept + self.theta * lost / 2)
        return x0 * kept + self.theta * lost, variance

    def draw(self, x0: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
        """x_t given x_0, exactly: a Poisson mixture of gammas (Broadie & Kaya, 2006, section 3.1).
        x0 and the generator are on one device."""
        t = match(as_time(t), x0)
        scale = self.xi**2 * -torch.expm1(-self.kappa * t) / (2 * self.kappa)
        jumps = torch.poisson(x0 * torch.exp(-self.kappa * t) / scale, generator=generator)
        return scale * torch._standard_gamma(self.shape + jumps, generator=generator)

    @property
    def shape(self) -> Any:
        """2 kappa theta/xi^2, the shape of the gamma law: at least 1 by Feller's rule."""
        return 2 * self.kappa * self.theta / self.xi**2

    def scale(self, t: Tensor, scale: Any = None) -> Tensor:
        """The scale of the gamma law at t, from that at 0; None: the stationary one."""
        end = self.xi**2 / (2 * self.kappa)
        return end + ((end if scale is None else scale) - end) * torch.exp(-self.kappa * t)

    def score(self, x: Tensor, t: Tensor, scale: Any = None) -> Tensor:
        """grad log p_t(x), x > 0, where x_0 ~ Gamma(2 kappa theta/xi^2, scale); None: the
        stationary scale."""
        return (self.shape - 1) / x - 1 / match(self.scale(as_time(t), scale), x)


@dataclass(frozen=True)
class Heston(SDE):
    """Heston's price S and variance v, x = (S, v) of shape (B, 2), noise of correlation rho.

        dS = mu S dt + sqrt(v) S dw_1,   dv = kappa (theta - v) dt + xi sqrt(v) dw_2

    Negative v, which only numerical paths have, gives no noise. Source: Heston (1993).
    """

    mu: float = 0.0
    kappa: float = 2.0
    theta: float = 0.04
    xi: float = 0.3
    rho: float = -0.7
    T: float = 1.0
    noise: ClassVar = "matrix"

    def __post_init__(self) -> None:
        _check(self, "kappa", "theta", "xi")
        if not -1 <= self.rho <= 1:
            raise ArgumentError(f"{self!r}: rho={self.rho!r} must be in [-1, 1]")

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        price, variance = _parts(self, x, 2)
        return torch.stack((self.mu * price, self.kappa * (self.theta - variance)), 1)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        price, variance = _parts(self, x, 2)
        root = variance.clamp_min(0).sqrt()
        own, other = (1 - self.rho**2) ** 0.5 * self.xi * root, self.rho * self.xi * root
        rows = torch.stack((root * price, torch.zeros_like(root), other, own), 1)
        return rows.reshape(-1, 2, 2)

    def divergence(self, x: Tensor, t: Tensor) -> Tensor:
        price, variance = _parts(self, x, 2)
        cross = self.rho * self.xi
        pair = ((2 * variance + cross) * price, cross * variance + self.xi**2)
        return torch.stack(pair, 1)

    def mean(self, x0: Tensor, t: Tensor) -> Tensor:
        """The mean of x_t given x_0."""
        price, variance = _parts(self, x0, 2)
        t = match(as_time(t), price)
        pulled = CIR(self.kappa, self.theta, self.xi).moments(variance, t)[0]
        return torch.stack((price * torch.exp(self.mu * t), pulled), 1)


@dataclass(frozen=True)
class DoubleWell(SDE):
    """Overdamped Langevin motion in a double well, elementwise.

        dx = -U'(x) dt + sqrt(2 temperature) dw,   U = height (x^2 - 1)^2

    Its stationary law is exp(-U/temperature) up to a factor. The defaults are
    dx = (x - x^3) dt + dw. Source: Kramers (1940).
    """

    height: float = 0.25
    temperature: float = 0.5
    T: float = 10.0
    additive: ClassVar = True

    def __post_init__(self) -> None:
        _check(self, "height", "temperature")

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return (-4 * self.height) * x * (x * x - 1)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.as_tensor((2 * self.temperature) ** 0.5, dtype=torch.float64)

    def potential(self, x: Tensor) -> Tensor:
        """U(x)."""
        return self.height * (x * x - 1) ** 2

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """The score of the stationary law, -U'(x)/temperature."""
        return self.drift(x, t) / self.temperature


@dataclass(frozen=True)
class StudentT(SDE):
    """A diffusion with heavy tails: dx = -rate x dt + sqrt(2 rate (scale^2 + x^2)) dw, elementwise.

    Its stationary law, of density scale^2 (scale^2 + x^2)^(-3/2)/2, is Student's t with 2 degrees
    of freedom times scale/sqrt(2). With y = asinh(x/scale), dy = -2 rate tanh(y) dt + sqrt(2 rate)
    dw, whose kernel is that of a reflectionless potential: for tau = rate t, z = y_0 and
    u = (y - z)/(2 sqrt(tau)),

        p(y) = cosh z/cosh y e^(-tau - u^2)/sqrt(4 pi tau) + (E+ + E-)/(4 cosh^2 y)
        P(y) = 1/2 + (E+ - E-)/4 + tanh y (E+ + E-)/4,    E+- = erf(sqrt(tau) +- u)

    Source: Bibby, Skovgaard & Sorensen (2005) for the diffusion; the kernel by Darboux's
    transformation of the heat kernel (Poschl & Teller, 1933).
    """

    rate: float = 1.0
    scale: float = 1.0
    T: float = 1.0

    def __post_init__(self) -> None:
        _check(self, "rate", "scale")

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return -self.rate * x

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return (2 * self.rate * (self.scale**2 + x * x)).sqrt()

    def divergence(self, x: Tensor, t: Tensor) -> Tensor:
        return (4 * self.rate) * x

    def cdf(self, x: Tensor, t: Tensor, x0: Any = None) -> Tensor:
        """P(x_t <= x) given x_0, a number or a tensor; None: under the stationary law."""
        tanh = x / (self.scale**2 + x * x).sqrt()
        if x0 is None:
            return (1 + tanh) / 2
        x0 = torch.as_tensor(x0, dtype=x.dtype, device=x.device)
        _, root, u = self._clock(x, t, x0)
        plus, minus = torch.erf(root + u), torch.erf(root - u)
        return 0.5 + (plus - minus) / 4 + tanh * (plus + minus) / 4

    def quantile(self, p: Tensor, t: Tensor, x0: Any = None) -> Tensor:
        """The x with P(x_t <= x) = p, 0 < p < 1: exact draws of x_t, from uniform p. By bisection
        where x_0 is given."""
        if x0 is None:
            return self.scale * (2 * p - 1) / (4 * p * (1 - p)).sqrt()
        high = torch.full_like(p, 40.0)
        low = -high
        for _ in range(64):
            middle = (low + high) / 2
            below = self.cdf(self.scale * middle.sinh(), t, x0) < p
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return self.scale * high.sinh()

    def log_density(self, x: Tensor, t: Tensor, x0: Any = None) -> Tensor:
        """log p_t(x), given x_0 or under the stationary law, elementwise."""
        square = self.scale**2 + x * x
        if x0 is None:
            return (self.scale**2 / (2 * square**1.5)).log()
        free, bound, _, root, u = self._kernel(x, t, x0)
        return (free + bound).log() - root**2 - u * u - square.log() / 2

    def score(self, x: Tensor, t: Tensor, x0: Any = None) -> Tensor:
        """grad log p_t(x), given x_0, a number or a tensor; None: under the stationary law."""
        square = self.scale**2 + x * x
        if x0 is None:
            return -3 * x / square
        free, bound, gap, root, u = self._kernel(x, t, x0)
        tanh, sech2 = x / square.sqrt(), self.scale**2 / square
        turned = -free * (tanh + u / root) - 2 * tanh * bound
        turned = turned - sech2 * gap.sinh() / (2 * math.pi**0.5 * root)
        return (turned / (free + bound) - tanh) / square.sqrt()

    def _clock(self, x: Tensor, t: Tensor, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(y - z, sqrt(tau), u)."""
        root = (self.rate * match(as_time(t), x)).sqrt()
        gap = torch.asinh(x / self.scale) - torch.asinh(x0 / self.scale)
        return gap, root, gap / (2 * root)

    def _kernel(self, x: Tensor, t: Tensor, x0: Any) -> tuple[Tensor, ...]:
        """The two terms of p(y) less their factor e^(-tau - u^2), without which nothing underflows;
        then what `_clock` gives."""
        x0 = torch.as_tensor(x0, dtype=x.dtype, device=x.device)
        gap, root, u = self._clock(x, t, x0)
        square, far, v, erfcx = self.scale**2 + x * x, gap.abs(), u.abs(), torch.special.erfcx
        free = ((self.scale**2 + x0**2) / square).sqrt() / (2 * math.pi**0.5 * root)
        both = erfcx(v - root) * far.exp() - erfcx(v + root) * (-far).exp()
        return free, both * self.scale**2 / (4 * square), gap, root, u


@dataclass(frozen=True)
class Lorenz(SDE):
    """Lorenz's system with noise: x of shape (B, 3, *), chaotic at the defaults.

    dx_1 = sigma (x_2 - x_1) dt + ..., dx_2 = (x_1 (rho - x_3) - x_2) dt + ...,
    dx_3 = (x_1 x_2 - beta x_3) dt + ..., each with volatility dw of its own.
    Source: Lorenz (1963); Li et al. (2020) with this noise.
    """

    sigma: float = 10.0
    rho: float = 28.0
    beta: float = 8 / 3
    volatility: float = 0.15
    T: float = 1.0
    additive: ClassVar = True

    def __post_init__(self) -> None:
        _check(self, "volatility")

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        a, b, c = _parts(self, x, 3)
        return torch.stack((self.sigma * (b - a), a * (self.rho - c) - b, a * b - self.beta * c), 1)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.as_tensor(self.volatility, dtype=torch.float64)


def _parts(sde: SDE, x: Tensor, n: int) -> tuple[Tensor, ...]:
    """The n components of the state, along axis 1."""
    if x.ndim < 2 or x.shape[1] != n or (sde.noise == "matrix" and x.ndim > 2):
        more = "" if sde.noise == "matrix" else ", *"
        raise ShapeError(
            f"x has shape {tuple(x.shape)}; a state of {type(sde).__name__} is (B, {n}{more})"
        )
    return x.unbind(1)


def _check(sde: Any, *positive: str) -> None:
    """Refuse parameters that are not finite, and T and those named where they are not > 0."""
    for name in (field.name for field in fields(sde)):
        value = getattr(sde, name)
        try:
            number = torch.as_tensor(value).detach()
            fine = bool(number.isfinite().all())
        except (TypeError, ValueError, RuntimeError):
            fine = False
        if not fine:
            raise ArgumentError(f"{sde!r}: {name}={value!r} must be a finite number")
        if name in ("T", *positive) and not bool((number > 0).all()):
            raise ArgumentError(f"{sde!r}: {name}={value!r} must be > 0")
