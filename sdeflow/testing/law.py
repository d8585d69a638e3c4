"""The exact law of what a linear solver returns on Gaussian data, without sampling.

Gaussian data make the whole run affine in x_T and the noise: run it on unit vectors and read off
the coefficients.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..reverse import ReverseSDE
from ..sample import integrate
from ..sde import SDE
from ..solver import Solver


class Affine(NamedTuple):
    """A run that is affine in x_T and the noise: x_0 = offset + gain x_T + noise, (K,) each."""

    offset: Tensor
    gain: Tensor
    noise: Tensor
    """The variance of the noise."""


class _OneHot:
    """Noise whose j-th call is one in row 3 + j, cos(j) in row 2 and zero elsewhere; it counts."""

    def __init__(self, rows: int, width: int) -> None:
        self.rows, self.width, self.calls = rows, width, 0

    def __call__(self, t: Tensor, s: Tensor) -> Tensor:
        z = torch.zeros(self.rows, self.width, dtype=torch.float64)
        if 3 + self.calls < self.rows:
            z[3 + self.calls], z[2] = 1, math.cos(self.calls)
        self.calls += 1
        return z


def output_law(
    process: ReverseSDE, ts: Tensor, solver: Solver | str, mean: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance, (K,) each, of what `solver` makes of x_T ~ N(mean, diag(variance)).

    Exact, for a linear solver and a process whose score is affine in each component (that of
    `GaussianData`): x_0 = b + a x_T + sum_j c_j z_j, read off from runs on unit vectors, one
    batch. A run that is not affine in x_T and the noise is refused.
    """
    run = affine(process, ts, solver, mean.shape[0])
    return run.offset + run.gain * mean, run.gain**2 * variance + run.noise


def affine(process: SDE, ts: Tensor, solver: Solver | str, width: int) -> Affine:
    """What `solver` makes of states (B, width) of a process that is affine in each component."""
    count = _OneHot(1, width)
    integrate(process, torch.zeros(1, width, dtype=torch.float64), ts, solver, noise=count)
    noise = _OneHot(3 + count.calls, width)
    x = torch.zeros(noise.rows, width, dtype=torch.float64)
    x[1], x[2] = 1, -2
    out = integrate(process, x, ts, solver, noise=noise).x
    b, a, c = out[0], out[1] - out[0], out[3:] - out[0]
    weights = torch.arange(len(c), dtype=torch.float64).cos().unsqueeze(1)
    expected = b - 2 * a + (weights * c).sum(0)
    size = b.abs() + 2 * a.abs() + c.abs().sum(0)
    if bool(((out[2] - expected).abs() > 1e-6 * (1 + size)).any()):
        raise ArgumentError(
            f"solver={solver!r} is not affine on this problem (a combination gives "
            f"{out[2].tolist()}, its parts {expected.tolist()}); its law cannot be read off, "
            "sample it"
        )
    return Affine(b, a, (c**2).sum(0))
