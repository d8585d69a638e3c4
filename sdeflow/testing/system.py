"""Gaussian data under a linear system: exact scores, and the exact law of what a solver returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..reverse import ReverseSDE
from ..sample import integrate
from ..solver import Solver
from ..system import LinearSystem, apply


@dataclass(frozen=True, eq=False)
class GaussianSystemData:
    """Data N(mean, covariance) under a linear system: an exact score.

    mean (d,), covariance (d, d), the same at every place of a state (B, d, *); a covariance of zero
    is one-point data. What the system's `start` adds at t = 0 comes on top.
    """

    sde: LinearSystem
    mean: Tensor
    covariance: Tensor

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The score, -C_t^{-1} (x - m_t)."""
        mean, covariance = self.law(t)
        away = x - mean.to(x).reshape(-1, len(self.mean), *[1] * (x.ndim - 2))
        return -apply(torch.linalg.inv(covariance), away)

    def law(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (*t.shape, d) and covariance (*t.shape, d, d) of x_t."""
        matrix, offset, covariance = self.sde.kernel_at(t)
        mean = (matrix @ self.mean.unsqueeze(-1)).squeeze(-1) + offset
        return mean, matrix @ self.covariance @ matrix.mT + covariance


class _OneHot:
    """Noise (rows, m): component j of call k is one in row first + m k + j, else zero."""

    def __init__(self, rows: int, width: int, first: int) -> None:
        self.rows, self.width, self.first, self.calls = rows, width, first, 0

    def __call__(self, t: Tensor, s: Tensor) -> Tensor:
        z = torch.zeros(self.rows, self.width, dtype=torch.float64)
        begin = self.first + self.width * self.calls
        if begin < self.rows:
            z[begin : begin + self.width] = torch.eye(self.width, dtype=torch.float64)
        self.calls += 1
        return z

    area = __call__


def system_law(
    process: ReverseSDE, ts: Tensor, solver: Solver | str, mean: Tensor, covariance: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of what `solver` makes of x_T ~ N(mean, covariance).

    Exact, for a linear solver and a score that is affine in x: x_0 = b + A x_T + sum_k C_k z_k is
    read off from a run on unit vectors. A run that is not affine in x_T is refused.
    """
    d = len(mean)
    x = torch.zeros(1, d, dtype=torch.float64)
    width = 0 if process.deterministic else process.noise_shape(x)[1]
    count = _OneHot(1, width, 1)
    integrate(process, x, ts, solver, noise=None if not width else count, seed=None if width else 0)
    rows = 2 + d + width * count.calls
    x = torch.zeros(rows, d, dtype=torch.float64)
    x[1], x[2 : 2 + d] = -2, torch.eye(d, dtype=torch.float64)
    if width:
        out = integrate(process, x, ts, solver, noise=_OneHot(rows, width, 2 + d)).x
    else:
        out = integrate(process, x, ts, solver).x
    b, a, c = out[0], (out[2 : 2 + d] - out[0]).mT, (out[2 + d :] - out[0]).mT
    if not torch.allclose(out[1] - b, -2 * a.sum(1), rtol=1e-6, atol=1e-6):
        raise ArgumentError(
            f"solver={solver!r} is not affine on this problem; its law cannot be read off: sample "
            "it"
        )
    return b + a @ mean, a @ covariance @ a.mT + c @ c.mT
