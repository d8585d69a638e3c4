"""`LinearSDE`: the Gaussian SDE of a drift rate f(t) and a diffusion g(t), and nothing else.

Its kernel solves alpha' = f alpha and (sigma^2)' = 2 f sigma^2 + g^2 by panels of quadrature, which
subtract nothing:

    log alpha <- log alpha + I,   sigma^2 <- sigma^2 e^{2I} + INT e^{2 INT_u f} g(u)^2 du

with I the integral of f over the panel, and INT_u f that from u to its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import ArgumentError, ShapeError, all_finite
from .quadrature import TOLERANCE, Panels, Values, tails, variation, weighted
from .sde import GaussianSDE, match, single_log_snr

Schedule = Callable[[Tensor], Tensor]


class LinearSDE(GaussianSDE):
    """A linear SDE, dx = f(t) x dt + g(t) dw, given by f and g alone.

        LinearSDE(f=lambda t: -0.5 * beta(t), g=lambda t: beta(t).sqrt(), T=1.0)

    or a (frozen data-)class of your own with two methods, which then is a value that can be
    compared, printed and saved:

        @dataclass(frozen=True)
        class Decay(LinearSDE):
            rate: float = 1.0
            def f(self, t): return -self.rate * torch.ones_like(t)
            def g(self, t): return torch.sqrt(1 + t)

    f, g: of t, () or (N,), and return that shape; or, for elementwise schedules, extra trailing
        dimensions that broadcast against x. A plain number will do. They are asked strictly
        inside (0, T), so that they may be singular there; jumps are found.
    T: the last time; t_min: where grids end by default.
    alpha and sigma are exact to rounding, relatively, at every t > 0. Gradients reach t and
    whatever parameters f and g are made of.
    """

    __slots__ = ("_panels",)  # beside the fields, so that a remembered solution is no part of them
    _panels: Panels

    def __init__(
        self,
        f: Schedule | None = None,
        g: Schedule | None = None,
        T: float | None = None,
        t_min: float | None = None,
    ) -> None:
        for name, value in (("f", f), ("g", g), ("T", T), ("t_min", t_min)):
            if value is not None:
                object.__setattr__(self, name, value)
        for name in ("f", "g"):
            own = getattr(self, name)
            if not callable(own) or getattr(own, "__func__", own) is getattr(LinearSDE, name):
                raise ArgumentError(
                    f"{name}={vars(self).get(name)!r} must be a function of t: give it, or define "
                    f"a method {name}(self, t)"
                )
        if not (0 < self.T < math.inf and 0 <= self.t_min < self.T):
            raise ArgumentError(
                f"T={self.T!r} and t_min={self.t_min!r} must obey 0 <= t_min < T < inf"
            )
        end = torch.tensor([self.T], dtype=torch.float64)
        log_alpha, variance = self.moments(end)
        if not (all_finite(log_alpha) and all_finite(variance)):
            raise ArgumentError(
                f"{self!r}: at T log alpha is {log_alpha.tolist()} and sigma^2 "
                f"{variance.tolist()}; both must be finite: check f and g, or end at a smaller T"
            )

    def __repr__(self) -> str:
        f, g = vars(self).get("f"), vars(self).get("g")
        given = f"f={f!r}, g={g!r}, " if f or g else ""
        return f"{type(self).__name__}({given}T={self.T!r}, t_min={self.t_min!r})"

    def __getstate__(self) -> dict[str, Any]:
        return vars(self).copy()

    def f(self, t: Tensor) -> Tensor:
        """The drift rate at t."""
        raise NotImplementedError

    def g(self, t: Tensor) -> Tensor:
        """The diffusion at t."""
        raise NotImplementedError

    @property
    def panels(self) -> Panels:
        """The solution from 0, kept from the first use on."""
        if not hasattr(self, "_panels"):
            object.__setattr__(self, "_panels", _Moments(self._coefficients).build(self.T))
        return self._panels

    def _coefficients(self, t: Tensor) -> Values:
        f, g = (_checked(self, name, t) for name in ("f", "g"))
        rank = max(f.ndim, g.ndim)
        f, g = (v.reshape(len(t), *[1] * (rank - v.ndim), *v.shape[1:]) for v in (f, g))
        f, g = torch.broadcast_tensors(f, g)
        return f, g * g

    # ---- the kernel

    def moments(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(log alpha_t, sigma_t^2)."""
        t = t if t.is_floating_point() else t.to(torch.float64)
        wide = t if t.device.type == "mps" else t.to(torch.float64)
        log_alpha, variance = self.panels.at(wide)
        return log_alpha.to(t.dtype), variance.to(t.dtype)

    def alpha(self, t: Tensor) -> Tensor:
        return self.moments(t)[0].exp()

    def sigma(self, t: Tensor) -> Tensor:
        return self.moments(t)[1].sqrt()

    def kernel(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha, variance = self.moments(t)
        return match(log_alpha.exp(), x, t), match(variance.sqrt(), x, t)

    def log_snr(self, t: Tensor) -> Tensor:
        log_alpha, variance = self.moments(t)
        return 2 * log_alpha - variance.log()

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        f, g2 = self._coefficients(t.reshape(-1))
        shape = (*t.shape, *f.shape[1:])
        return f.reshape(shape).to(t.dtype), g2.reshape(shape).to(t.dtype)

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha' = f alpha, sigma' = f sigma + g^2/(2 sigma)."""
        (f, g2), (log_alpha, variance) = self.rates(t), self.moments(t)
        sigma = variance.sqrt()
        return f * log_alpha.exp(), f * sigma + g2 / (2 * sigma)

    @torch.no_grad()
    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """The t with log_snr(t) = log_snr, by Newton's method in a bracket, to rounding.

        The slope is known: d log_snr/dt = -g^2/sigma^2. Times below 1e-16 T are not resolved.
        """
        target = torch.as_tensor(log_snr, dtype=torch.float64)
        knots = torch.cat((self.panels.knots[:1] + 1e-16 * self.T, self.panels.knots[1:]))
        knots = knots.to(target.device)
        known = single_log_snr(self, knots)
        k = torch.searchsorted(-known, -target.reshape(-1)).clamp(1, len(knots) - 1)
        low, high = (knots[i].reshape(target.shape) for i in (k - 1, k))
        t = (low * high).sqrt()
        for _ in range(70):
            log_alpha, variance = self.moments(t)
            gap = 2 * log_alpha - variance.log() - target
            low, high = torch.where(gap > 0, t, low), torch.where(gap > 0, high, t)
            # In log t: log_snr falls like -log t from the data on.
            newton = t * (gap * variance / (self.rates(t)[1] * t)).clamp(-40, 40).exp()
            inside = (newton >= low) & (newton <= high)
            middle = torch.where(high > 2 * low, (low * high).sqrt(), (low + high) / 2)
            before, t = t, torch.where(inside, newton, middle)
            # Newton doubles the digits: after a step of 1e-9 all are there.
            if ((t - before).abs() <= torch.where(inside, 1e-9, 1e-16) * t).all():
                break
        return t


class _Moments(Panels):
    """(I, V) = (INT f, INT e^{2 INT_u f} g^2) over panels, from (f, g^2)."""

    def panel(self, values: Values, a: Tensor, b: Tensor) -> Values:
        f, g2 = values
        return weighted(f, b - a), weighted(torch.exp(2 * tails(f, b - a)) * g2, b - a)

    def compose(self, first: Values, second: Values) -> Values:
        return first[0] + second[0], first[1] * torch.exp(2 * second[0]) + second[1]

    def agree(self, whole: Values, halves: Values, values: Values, a: Tensor, b: Tensor) -> Tensor:
        f, g2 = values
        (i, v), (i2, v2) = whole, halves
        eps = 4 * torch.finfo(f.dtype).eps * b.abs().reshape(-1, *[1] * (f.ndim - 2))
        room = TOLERANCE * (1 + i2.abs()) + eps * variation(f)
        same = (i - i2).abs() <= room
        room = v2 * (TOLERANCE + 2 * room) + eps * variation(torch.exp(2 * tails(f, b - a)) * g2)
        same &= (v - v2).abs() <= room
        return same.reshape(len(a), -1).all(1)


def _checked(sde: LinearSDE, name: str, t: Tensor) -> Tensor:
    """f or g at times (N,), as (N, *); refused where it has the wrong shape or is not finite."""
    value = torch.as_tensor(getattr(sde, name)(t), dtype=t.dtype, device=t.device)
    if value.ndim == 0:
        value = value.expand(t.shape)
    if value.shape[:1] != t.shape:
        raise ShapeError(
            f"{type(sde).__name__}: {name}(t) has shape {tuple(value.shape)} for t of shape "
            f"{tuple(t.shape)}; it must be {tuple(t.shape)}, or have extra dimensions after it"
        )
    return value
