"""Distances between two sets of states: Frechet's, and the sliced Wasserstein distance.

Source of the first: Heusel et al. (2017), eq. 6.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdeflow.errors import ShapeError


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two sets of vectors (N, d), N > 1."""
    for name, rows in (("a", a), ("b", b)):
        if rows.ndim != 2 or len(rows) < 2:
            raise ShapeError(f"{name} has shape {tuple(rows.shape)}; it must be (N, d), N > 1")
    a, b = a.double(), b.double()
    c_a, c_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    values, vectors = torch.linalg.eigh(c_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c_b @ root).clamp_min(0).sqrt().sum()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    return float(shift + c_a.trace() + c_b.trace() - 2 * cross)


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 128) -> float:
    """The sliced 2-Wasserstein distance of two sets of states (N, *), for data without a judge.

    The mean over random directions of the distance of the sorted projections.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = a.flatten(1).double(), b.flatten(1).double()
    d = torch.randn(a.shape[1], directions, generator=generator, dtype=torch.float64)
    d = d / d.norm(dim=0)
    q = torch.linspace(0, 1, 512, dtype=torch.float64)
    gap = torch.quantile(a @ d, q, dim=0) - torch.quantile(b @ d, q, dim=0)
    return math.sqrt(float(gap.square().mean()))


def gaussian_like(x: Tensor, n: int, seed: int = 0) -> Tensor:
    """n draws from the Gaussian with the mean and full covariance of x (N, *)."""
    rows = x.flatten(1).double()
    values, vectors = torch.linalg.eigh(torch.cov(rows.T))
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, rows.shape[1], generator=generator, dtype=torch.float64)
    draws = rows.mean(0) + z * values.clamp_min(0).sqrt() @ vectors.T
    return draws.to(x.dtype).reshape(n, *x.shape[1:])
