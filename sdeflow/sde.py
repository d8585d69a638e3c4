"""Forward stochastic differential equations: `SDE`, and `GaussianSDE` with its exact kernel.

An SDE is dx = f(x, t) dt + g(x, t) dw on 0 <= t <= T, data at t = 0 and noise at t = T.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .derivatives import divergence, flat, one_each, slope
from .errors import ArgumentError, ShapeError, all_finite, one_of

NOISES = ("elementwise", "scalar", "matrix")
CALCULI = ("ito", "stratonovich")


class SDE(ABC):
    """A forward SDE, dx = f(x, t) dt + g(x, t) dw.

    A subclass writes two methods, `drift` and `diffusion`, and says what the noise is:
    noise = "elementwise" (the default): g broadcasts against x, and every component has a Wiener
        process of its own;
    noise = "scalar": g broadcasts against x, and one Wiener process drives all of a sample;
    noise = "matrix": G has the shape (B, *, m), and m Wiener processes drive the state.
    calculus = "ito" (the default) or "stratonovich": how the product g dw is meant. Solvers that
        work in the other sense get the drift converted.
    States have any rank: x is (B, *). t is () or (B,).
    """

    T: float = 1.0
    """The last time; data sit at t = 0."""

    noise: ClassVar[Literal["elementwise", "scalar", "matrix"]] = "elementwise"
    calculus: ClassVar[Literal["ito", "stratonovich"]] = "ito"
    additive: ClassVar[bool] = False
    """Whether g is known not to depend on x."""

    commutative: ClassVar[bool] = False
    """Whether matrix noise is known to commute: (dg_k) g_l = (dg_l) g_k for all columns of G.
    (Scalar and additive noise does, and elementwise noise whose g_i looks at x_i alone.)"""

    direction: ClassVar[int] = 1
    """+1 runs up in time, -1 down, 0 either way (an ODE)."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, allowed in (("noise", NOISES), ("calculus", CALCULI)):
            if isinstance(value := getattr(cls, name), str):  # else a property, or a field
                one_of(f"{cls.__name__}.{name}", value, allowed)

    @property
    def deterministic(self) -> bool:
        """Whether no noise drives it: an ODE, which runs either way."""
        return self.direction == 0

    @abstractmethod
    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """f(x, t), of the shape of x."""

    @abstractmethod
    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        """g(x, t), broadcasting against x; or the matrix G(x, t) of shape (B, *, m)."""

    def noise_shape(self, x: Tensor) -> torch.Size:
        """The shape of one Wiener increment: that of x; (B, 1) for scalar noise, (B, m) for a
        matrix."""
        if self.noise == "elementwise":
            return x.shape
        if self.noise == "scalar":
            return torch.Size((x.shape[0], 1))
        t = torch.as_tensor(self.T, dtype=torch.float64)
        return torch.Size((x.shape[0], self.diffusion(x, t).shape[-1]))

    def spread(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """G(x, t) z: what unit normals z do to the state."""
        g = self.diffusion(x, t)
        if self.noise == "elementwise":
            return g * z
        if self.noise == "scalar":
            return g * z.reshape(one_each(x))
        return (g * z.reshape(*one_each(x), z.shape[-1])).sum(-1)

    def covariance_product(self, x: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """(G G^T)(x, t) v, for v of the shape of x."""
        g = self.diffusion(x, t)
        if self.noise == "elementwise":
            return g * g * v
        if self.noise == "scalar":
            return g * flat(g * v).sum(1).reshape(one_each(x)).expand(x.shape)
        back = (g * v.unsqueeze(-1)).reshape(*flat(x).shape, g.shape[-1]).sum(1)
        return (g * back.reshape(*one_each(x), g.shape[-1])).sum(-1)

    def divergence(self, x: Tensor, t: Tensor) -> Tensor:
        """div(G G^T)_i = sum_j d_j (G G^T)_ij, of the shape of x, by autograd.

        Zero where G does not depend on x. Where each g_i looks at x_i alone it costs two
        vector-Jacobian products; otherwise, and for matrix noise, d Jacobian-vector products, d
        being the size of one state: override it where there is a closed form, or see `Hutchinson`.
        """
        if self.additive:
            return torch.zeros_like(x)
        return divergence(lambda y: self.diffusion(y, t), self.noise, x)


class GaussianSDE(SDE):
    """A linear SDE with the kernel p(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I).

    `alpha(t)` and `sigma(t)` say it all: f = (alpha'/alpha) x and g^2 = 2 sigma (sigma' - f sigma)
    follow by autograd. Both take t of shape () or (B,) and return that shape; elementwise
    schedules (per channel, per pixel) return extra trailing dimensions, the same from both, that
    broadcast against x.
    """

    additive: ClassVar[bool] = True
    t_min: float = 1e-3
    """The default last time of grids and the first of training: sigma(t_min) is small, not zero."""

    def __post_init__(self) -> None:
        """Refuse parameters that make no schedule. Called by the __init__ of dataclasses."""
        if "__dataclass_params__" not in vars(type(self)):
            return  # a subclass with an __init__ of its own, which may not be through yet
        if not 0 < self.T < math.inf:
            raise ArgumentError(f"{self!r}: T={self.T!r} must be finite and > 0")
        if not 0 <= self.t_min < self.T:
            raise ArgumentError(f"{self!r}: t_min={self.t_min!r} must be in [0, T)")
        ends = torch.tensor([self.t_min, self.T], dtype=torch.float64)
        try:
            a, s = self.alpha(ends), self.sigma(ends)
        except (ArithmeticError, ValueError) as error:
            raise ArgumentError(
                f"{self!r} has no schedule ({error}); check its parameters"
            ) from error
        if not (all_finite(a) and all_finite(s) and bool((a >= 0).all() and (s >= 0).all())):
            raise ArgumentError(
                f"{self!r}: at t_min and T alpha is {a.tolist()} and sigma {s.tolist()}; both must "
                "be finite and >= 0: check the parameters"
            )

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """The scale of the data at time t; alpha(0) = 1."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """The standard deviation of the noise at time t; sigma(0) = 0."""

    # ---- what follows from the two

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(d alpha/dt, d sigma/dt), by reverse-mode autograd."""
        return slope(self.alpha, t), slope(self.sigma, t)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(f_t, g_t^2) of dx = f_t x dt + g_t dw. Override where there are closed forms."""
        a, s = self.alpha(t), self.sigma(t)
        da, ds = self.slopes(t)
        f = da / a
        return f, 2 * s * (ds - f * s)

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return match(self.rates(t)[0], x, t) * x

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return match(self.rates(t)[1].clamp_min(0).sqrt(), x, t)

    def kernel(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t), each ready to multiply x."""
        return match(self.alpha(t), x, t), match(self.sigma(t), x, t)

    def log_snr(self, t: Tensor) -> Tensor:
        """2 log(alpha_t / sigma_t): +inf at the data, falling with t."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """The t with log_snr(t) = log_snr, by bisection to float64 precision.

        Times below 1e-16 T are not resolved. Override where there is a closed form.
        """
        target = torch.as_tensor(log_snr, dtype=torch.float64)
        low = torch.full_like(target, 1e-16 * self.T)
        high = torch.full_like(target, self.T)
        for _ in range(70):
            # The geometric mean resolves t near zero, the arithmetic one t near T.
            middle = torch.where(high > 2 * low, (low * high).sqrt(), (low + high) / 2)
            below = single_log_snr(self, middle) > target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def perturb(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t noise, for unit normals of the shape of x0."""
        if noise.shape != x0.shape:
            raise ShapeError(
                f"noise has shape {tuple(noise.shape)}; it must be that of x0, {tuple(x0.shape)}"
            )
        a, s = self.kernel(x0, t)
        return a * x0 + s * noise

    def posterior(
        self, x: Tensor, x0: Tensor, t: Tensor, s: Tensor, eta: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(x_s | x_t, x_0), s < t, of the eta-family of DDIM.

        mean = alpha_s x_0 + sqrt(sigma_s^2 - v) eps, v = eta^2 sigma_s^2 (1 - e^{-2h}), where
        eps = (x_t - alpha_t x_0)/sigma_t and h = (log_snr(s) - log_snr(t))/2. eta = 1 is the
        Markov posterior of DDPM. This form of v holds for every kernel; the usual print,
        (sigma_s/sigma_t)^2 (1 - alpha_t^2/alpha_s^2), is its variance-preserving case and gives
        zero where alpha = 1. Source: Song et al. (2021, DDIM), eq. 12 and 16.
        """
        a_t, s_t = self.kernel(x, t)
        a_s, s_s = self.kernel(x, s)
        eps = (x - a_t * x0) / s_t
        if not eta:
            return a_s * x0 + s_s * eps, torch.zeros_like(s_s)
        two_h = match(self.log_snr(s) - self.log_snr(t), x, s + t)
        kept = (1 - eta**2) + eta**2 * torch.exp(-two_h)
        std = eta * s_s * torch.sqrt(-torch.expm1(-two_h))
        return a_s * x0 + s_s * torch.sqrt(kept) * eps, std

    def prior(self, noise: Tensor, t: Tensor | float | None = None) -> Tensor:
        """x_T = sigma_T noise: the law of x_T for data small beside sigma_T/alpha_T."""
        time = torch.as_tensor(self.T if t is None else t, dtype=torch.float64)
        return match(self.sigma(time), noise, time) * noise


def single_log_snr(sde: GaussianSDE, t: Tensor) -> Tensor:
    """log_snr(t), one number a time; an error for elementwise schedules, which have many."""
    if (log_snr := sde.log_snr(t)).shape != t.shape:
        raise ShapeError(
            f"{type(sde).__name__} has elementwise schedules, and so no single log-SNR; use the "
            "grid 'uniform', and times='uniform' in training"
        )
    return log_snr


def match(a: Tensor, x: Tensor, t: Tensor | None = None) -> Tensor:
    """A schedule value, shaped and cast to multiply x: (), (B,) or already of x's rank.

    t: the time it belongs to, which tells a schedule (C,) at one time from one number a sample.
    A 0-dim value stays on the host in float64: torch scales a tensor by it without a transfer.
    """
    if a.ndim == 0 or not isinstance(x, Tensor):
        return a
    if a.ndim == 1 and x.ndim != 1 and (t is None or t.ndim):
        if a.shape[0] not in (1, x.shape[0]):
            raise ShapeError(f"t has shape {tuple(a.shape)}; it must be () or ({x.shape[0]},)")
        a = a.reshape(-1, *[1] * (x.ndim - 1))
    return a.to(dtype=x.dtype, device=x.device)


def as_time(t: Tensor | float) -> Tensor:
    """A time as a float64 tensor (float32 on devices without); NaN, infinite and negative times
    are refused where they are host numbers."""
    if isinstance(t, Tensor):
        return t.to(torch.float32 if t.device.type == "mps" else torch.float64)
    if not (t >= 0 and t < float("inf")):
        raise ArgumentError(f"t={t!r} must be a finite time >= 0")
    return torch.tensor(float(t), dtype=torch.float64)
