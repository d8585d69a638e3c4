"""The one table of parametrisations, and `Denoiser`: a network read as E[x_0 | x_t].

Every parametrisation in use predicts a combination F = p x_0 + q eps of data and noise, with p
and q from the table. With x_t = alpha x_0 + sigma eps, the rest follows:

    training target   F* = p x_0 + q eps
    denoiser          D(x, t) = (sigma F - q x) / (p sigma - q alpha)
    score             s(x, t) = (alpha D - x) / sigma^2
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import ArgumentError, ShapeError, one_of
from .sde import GaussianSDE, as_time, match


class Row(NamedTuple):
    """F = p x_0 + q eps for a network that sees (c_in x, c_noise)."""

    p: Tensor
    q: Tensor
    c_in: Tensor | None
    """The scale of the network's input; None for 1."""
    c_noise: Tensor
    """The time as the network sees it."""


def _data(sde: GaussianSDE, t: Tensor, sigma_data: float) -> Row:
    one = torch.ones_like(sde.alpha(t))
    return Row(one, 0 * one, None, t)


def _noise(sde: GaussianSDE, t: Tensor, sigma_data: float) -> Row:
    one = torch.ones_like(sde.alpha(t))
    return Row(0 * one, one, None, t)


def _score(sde: GaussianSDE, t: Tensor, sigma_data: float) -> Row:
    s = sde.sigma(t)
    return Row(torch.zeros_like(s), -1 / s, None, t)


def _v(sde: GaussianSDE, t: Tensor, sigma_data: float) -> Row:
    return Row(-sde.sigma(t), sde.alpha(t), None, t)


def _velocity(sde: GaussianSDE, t: Tensor, sigma_data: float) -> Row:
    slope_alpha, slope_sigma = sde.slopes(t)
    return Row(slope_alpha, slope_sigma, None, t)


def _edm(sde: GaussianSDE, t: Tensor, sigma_data: float) -> Row:
    a, s = sde.alpha(t), sde.sigma(t)
    if s.shape != t.shape:
        raise ShapeError(
            "prediction='edm' shows the network one noise level a sample, and "
            f"{type(sde).__name__} has elementwise schedules; use 'v' or 'data'"
        )
    norm = torch.sqrt(s**2 + (a * sigma_data) ** 2)
    c_noise = torch.log((s / a).clamp_min(1e-30)) / 4  # finite at sigma = 0
    return Row(s / (sigma_data * norm), -a * sigma_data / norm, 1 / norm, c_noise)


# fmt: off
PREDICTIONS: dict[str, Callable[[GaussianSDE, Tensor, float], Row]] = {
    # F = p x_0 + q eps                             source
    "data": _data,          # x_0                   Ramesh et al. (2022)
    "noise": _noise,        # eps                   Ho et al. (2020), DDPM
    "score": _score,        # -eps/sigma            Song et al. (2021), Score-SDE
    "v": _v,                # alpha eps - sigma x_0 Salimans & Ho (2022)
    "velocity": _velocity,  # dx_t/dt               Lipman et al. (2023)
    "edm": _edm,            # unit variance         Karras et al. (2022), EDM; sees c_in x, c_noise
}
ALIASES = {
    "eps": "noise",
    "epsilon": "noise",
    "x0": "data",
    "sample": "data",
    "v_prediction": "v",
    "flow": "velocity",
}
# fmt: on


@dataclass(frozen=True)
class Denoiser:
    """A network read as D(x, t) = E[x_0 | x_t = x]; called, it is the score.

    net: any callable (x, t) -> F, x (B, *), t (B,) in x's dtype, F of the shape of x.
    sde: the Gaussian SDE that the network was trained for.
    prediction: what F is: "noise", "data", "v", "velocity", "score" or "edm".
    sigma_data: the standard deviation of the data, used by "edm" alone.
    """

    net: Callable[[Tensor, Tensor], Tensor]
    sde: GaussianSDE
    prediction: str = "noise"
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if not callable(self.net):
            raise ArgumentError(f"net={self.net!r} must be callable as net(x, t)")
        if not isinstance(self.sde, GaussianSDE):
            raise ArgumentError(
                f"sde={self.sde!r} must be a GaussianSDE: a Denoiser needs its kernel"
            )
        name = ALIASES.get(self.prediction, self.prediction)
        object.__setattr__(self, "prediction", one_of("prediction", name, PREDICTIONS))
        if not self.sigma_data > 0:
            raise ArgumentError(f"sigma_data={self.sigma_data!r} must be > 0")

    def row(self, t: Tensor) -> Row:
        """The row of the table at time t."""
        return PREDICTIONS[self.prediction](self.sde, t, self.sigma_data)

    def network(self, x: Tensor, t: Tensor) -> Tensor:
        """F, the network's own output at (x, t), its shape checked."""
        row = self.row(t)
        return self._call(row, x)

    def denoise(self, x: Tensor, t: Tensor | float) -> Tensor:
        """E[x_0 | x_t = x], of the shape of x; at sigma = 0 it is x/alpha."""
        t = as_time(t)
        row = self.row(t)
        c_skip, c_out = self.skip_and_out(row, t)
        return match(c_skip, x, t) * x + match(c_out, x, t) * self._call(row, x)

    def skip_and_out(self, row: Row, t: Tensor) -> tuple[Tensor, Tensor]:
        """(c_skip, c_out) of D = c_skip x + c_out F."""
        a, s = self.sde.alpha(t), self.sde.sigma(t)
        bottom = row.p * s - row.q * a
        clean = s == 0
        return torch.where(clean, 1 / a, -row.q / bottom), torch.where(clean, 0.0, s / bottom)

    def noise(self, x: Tensor, t: Tensor | float) -> Tensor:
        """E[eps | x_t = x] = (x - alpha D)/sigma."""
        t = as_time(t)
        a, s = self.sde.kernel(x, t)
        return (x - a * self.denoise(x, t)) / s

    def __call__(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The score, grad log p_t(x) = (alpha D - x)/sigma^2."""
        t = as_time(t)
        a, s = self.sde.kernel(x, t)
        return (a * self.denoise(x, t) - x) / s**2

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """F* = p x_0 + q eps, what the network is trained to predict."""
        row = self.row(t)
        return match(row.p, x0, t) * x0 + match(row.q, x0, t) * noise

    def _call(self, row: Row, x: Tensor) -> Tensor:
        inner = x if row.c_in is None else match(row.c_in, x) * x
        if not isinstance(x, Tensor):  # a trace: the recorder wants the time itself
            return self.net(inner, row.c_noise)
        return checked_output("net", self.net(inner, batch_time(row.c_noise, x)), x)


def batch_time(t: Tensor, x: Tensor) -> Tensor:
    """t as a network sees it: (B,), in the dtype and on the device of x."""
    if t.ndim == 0:
        return torch.full((x.shape[0],), float(t), dtype=x.dtype, device=x.device)
    return t.to(dtype=x.dtype, device=x.device)


def checked_output(name: str, output: Tensor, x: Tensor) -> Tensor:
    """`output` if it is a tensor of the shape of x; otherwise an error that says what to do."""
    if not isinstance(output, Tensor):
        raise ShapeError(
            f"{name}(x, t) returned {type(output).__name__}; it must return a tensor of the shape "
            f"of x, {tuple(x.shape)} (for a diffusers model: lambda x, t: model(x, t).sample)"
        )
    if output.shape != x.shape:
        raise ShapeError(
            f"{name}(x, t) returned shape {tuple(output.shape)} for x of shape {tuple(x.shape)}; "
            "it must be the same (a network that also learns a variance: keep its first half)"
        )
    return output.to(x.dtype)
