"""The exact law of what a linear solver returns on Gaussian data, without sampling.

Gaussian data make the whole run affine in x_T and the noise: run it on unit vectors and read off
the coefficients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..reverse import ReverseSDE
from ..sample import integrate
from ..solver import Solver


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
