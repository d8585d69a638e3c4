"""Problems with exact scores: Gaussian data and Gaussian mixtures under a Gaussian SDE."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..sde import GaussianSDE


@dataclass(frozen=True, eq=False)
class GaussianData:
    """Data N(mean, diag(variance)) under a Gaussian SDE: an exact denoiser and score.

    mean, variance: (K,), broadcasting against the state; a variance of 0 is one-point data.
    """

    sde: GaussianSDE
    mean: Tensor
    variance: Tensor

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t = x] = m + alpha v/(alpha^2 v + sigma^2) (x - alpha m)."""
        a, s = self.sde.kernel(x, t)
        gain = a * self.variance / (a * a * self.variance + s * s)
        return self.mean + gain * (x - a * self.mean)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The score, (alpha m - x)/(alpha^2 v + sigma^2)."""
        a, s = self.sde.kernel(x, t)
        return (a * self.mean - x) / (a * a * self.variance + s * s)

    def law(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of x_t, (K,) each."""
        a, s = self.sde.alpha(t), self.sde.sigma(t)
        return a * self.mean, a * a * self.variance + s * s


@dataclass(frozen=True, eq=False)
class MixtureData:
    """Data from an isotropic Gaussian mixture: nonlinear, with an exact denoiser and score.

    means (M, d), variance a number, weights (M,) summing to one.
    """

    sde: GaussianSDE
    means: Tensor
    variance: float
    weights: Tensor

    @classmethod
    def five(cls, sde: GaussianSDE) -> MixtureData:
        """Five components in the plane, of unequal weights: the standard problem for orders."""
        angle = torch.arange(5, dtype=torch.float64) * (2 * math.pi / 5)
        means = torch.stack((angle.cos(), angle.sin()), 1) * torch.linspace(0.6, 1.4, 5)[:, None]
        weights = torch.arange(1, 6, dtype=torch.float64)
        return cls(sde, means.to(torch.float64), 0.25, weights / weights.sum())

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t = x], the components' means weighted by their responsibility."""
        a, s = (v.unsqueeze(1) if v.ndim else v for v in self.sde.kernel(x, t))
        total = a * a * self.variance + s * s
        offset = x.unsqueeze(1) - a * self.means
        logits = self.weights.log() - (offset**2 / (2 * total)).sum(-1)
        gain = a * self.variance / total
        each = self.means + gain * offset
        return (torch.softmax(logits, 1).unsqueeze(-1) * each).sum(1)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The score, (alpha D - x)/sigma^2."""
        a, s = self.sde.kernel(x, t)
        return (a * self.denoise(x, t) - x) / s**2
