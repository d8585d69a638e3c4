"""The conformance kit: problems with exact scores, exact output laws, measured orders.

For a solver that is linear, Gaussian data make the whole run affine in x_T and the noise. So the
law of its output is known without sampling: run it on unit vectors and read off the coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ArgumentError
from .grid import log_snr
from .reverse import ReverseSDE
from .sample import integrate
from .sde import GaussianSDE
from .solver import Solver


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


class _OneHot:
    """Noise whose j-th call is one in row 3 + j and zero elsewhere; it counts its calls."""

    def __init__(self, rows: int, width: int) -> None:
        self.rows, self.width, self.calls = rows, width, 0

    def __call__(self, t: Tensor, s: Tensor) -> Tensor:
        z = torch.zeros(self.rows, self.width, dtype=torch.float64)
        if 3 + self.calls < self.rows:
            z[3 + self.calls] = 1
        self.calls += 1
        return z


def output_law(
    process: ReverseSDE, ts: Tensor, solver: Solver | str, mean: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance, (K,) each, of what `solver` makes of x_T ~ N(mean, diag(variance)).

    Exact, for a linear solver and a process whose score is affine in each component (that of
    `GaussianData`): x_0 = b + a x_T + sum_j c_j z_j, read off from runs on unit vectors, one
    batch. A run that is not affine in x_T is refused.
    """
    width = mean.shape[0]
    count = _OneHot(1, width)
    integrate(process, torch.zeros(1, width, dtype=torch.float64), ts, solver, noise=count)
    noise = _OneHot(3 + count.calls, width)
    x = torch.zeros(noise.rows, width, dtype=torch.float64)
    x[1], x[2] = 1, -2
    out = integrate(process, x, ts, solver, noise=noise).x
    b, a, c = out[0], out[1] - out[0], out[3:] - out[0]
    if not torch.allclose(out[2], b - 2 * a, rtol=1e-6, atol=1e-6):
        raise ArgumentError(
            f"solver={solver!r} is not affine on this problem (x = -2 gives {out[2].tolist()}, the "
            f"line through 0 and 1 {(b - 2 * a).tolist()}); its law cannot be read off, sample it"
        )
    return b + a * mean, a**2 * variance + (c**2).sum(0)


Grid = Callable[[GaussianSDE, int], Tensor]


def weak_errors(
    solver: Solver | str,
    sde: GaussianSDE,
    eta: float,
    steps: list[int],
    grid: Grid = log_snr,
    variance: float = 0.4,
) -> list[float]:
    """Relative error of the output variance on N(0, variance) at each number of steps, exactly."""
    data = GaussianData(sde, torch.zeros(1).double(), torch.full((1,), variance).double())
    process = ReverseSDE(sde, data, eta)
    errors = []
    for n in steps:
        ts = grid(sde, n)
        _, made = output_law(process, ts, solver, *data.law(ts[0]))
        errors.append(float(made / data.law(ts[-1])[1] - 1))
    return errors


def strong_errors(
    solver: Solver | str, sde: GaussianSDE, steps: list[int], grid: Grid = log_snr
) -> list[float]:
    """RMS error against a fine reference on the probability flow of a Gaussian mixture."""
    from .backends import TorchDiffEq

    process = ReverseSDE(sde, MixtureData.five(sde), 0.0)
    generator = torch.Generator().manual_seed(0)
    x = sde.prior(torch.randn(64, 2, dtype=torch.float64, generator=generator), grid(sde, 1)[0])
    exact = integrate(process, x, grid(sde, 1), TorchDiffEq("dopri8", 1e-12, 1e-12)).x
    return [
        float((integrate(process, x, grid(sde, n), solver).x - exact).square().mean().sqrt())
        for n in steps
    ]


def order(errors: list[float], steps: list[int]) -> float:
    """The slope of log error against log steps, over the last two."""
    if len(errors) < 2 or len(errors) != len(steps):
        raise ArgumentError(
            f"errors ({len(errors)}) and steps ({len(steps)}) must match, at least two"
        )
    ratio = abs(errors[-2]) / abs(errors[-1])
    return math.log(ratio) / math.log(steps[-1] / steps[-2])
