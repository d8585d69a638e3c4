"""Distances between two sets of vectors: Frechet's, the kernel distance, sliced Wasserstein.

Each comes twice: as a number, and as a `Statistic` of the first set, which the bootstrap reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdeflow.errors import ShapeError, positive_int

from .bootstrap import Statistic

# ---- Frechet


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two sets of vectors (N, d), N > 1.

    The squared 2-Wasserstein distance of the two Gaussians. Source: Heusel et al. (2017), eq. 6.
    """
    return _value(frechet(a, b), a)


def frechet(a: Tensor, b: Tensor) -> Statistic:
    """Frechet's distance of a, drawn again, to b."""
    a, b = _vectors(a, b)
    mean_b, cov_b = _moments(b, torch.ones(len(b), dtype=torch.float64))
    values, vectors = torch.linalg.eigh(cov_b)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T

    def one(counts: Tensor) -> Tensor:
        mean_a, cov_a = _moments(a, counts)
        cross = torch.linalg.eigvalsh(root @ cov_a @ root).clamp_min(0).sqrt().sum()
        gap = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
        return gap.clamp_min(0)

    return lambda counts: torch.stack([one(row) for row in counts])


def _moments(x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the unbiased covariance of rows that count so often."""
    n = counts.sum()
    mean = counts @ x / n
    centred = x - mean
    return mean, (centred * counts[:, None]).T @ centred / (n - 1)


# ---- the kernel distance


def kernel_distance(a: Tensor, b: Tensor, block: int = 1000) -> float:
    """The kernel distance (KID): the squared maximum mean discrepancy with k = (x.y/d + 1)^3.

        mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean_{i, j} k(a_i, b_j)

    Unbiased at every sample size: 0 on average for equal laws, so it may be negative. Larger sets
    are split at random into blocks of about `block`, and the blocks' values averaged.
    Source: Binkowski et al. (2018), sections 3 and 4.
    """
    return _value(kernel(a, b, block), a)


def kernel(a: Tensor, b: Tensor, block: int = 1000) -> Statistic:
    """The kernel distance of a, drawn again, to b; a pair of equal draws is no pair."""
    a, b = _vectors(a, b)
    blocks = max(1, min(len(a), len(b)) // max(2, positive_int("block", block)))
    generator = torch.Generator().manual_seed(0)
    parts_a = torch.randperm(len(a), generator=generator).chunk(blocks)
    parts_b = torch.randperm(len(b), generator=generator).chunk(blocks)

    def k(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def of(counts: Tensor) -> Tensor:
        total = torch.zeros(len(counts), dtype=torch.float64)
        for i, j in zip(parts_a, parts_b, strict=True):
            c, x, y = counts[:, i], a[i], b[j]
            n = c.sum(1)
            within_a = ((c @ k(x, x).fill_diagonal_(0)) * c).sum(1) / (n**2 - c.square().sum(1))
            within_b = k(y, y).fill_diagonal_(0).sum() / (len(y) * (len(y) - 1))
            total += within_a + within_b - 2 * (c @ k(x, y).mean(1)) / n
        return total / blocks

    return of


# ---- sliced Wasserstein


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 128) -> float:
    """The sliced 2-Wasserstein distance of two sets of states (N, *), which needs no features.

    The root of the mean over random directions (always the same) of the squared distance of the
    projections' quantile functions, exactly, for sets of any two sizes.
    Source: Bonneel et al. (2015), section 3.
    """
    return _value(sliced(a, b, directions), a)


def sliced(a: Tensor, b: Tensor, directions: int = 128) -> Statistic:
    """The sliced Wasserstein distance of a, drawn again, to b.

    Of a projection with quantile functions A and B it is INT A^2 + INT B^2 - 2 INT A B. A is a_i
    between the levels u_{i-1} and u_i, so the last integral is a sum over i alone of
    a_i (I(u_i) - I(u_{i-1})), where I(u), the integral of B up to u, is piecewise linear.
    """
    a, b = _vectors(a.flatten(1), b.flatten(1))
    m, axes = len(b), unit_vectors(b.shape[1], directions)
    middle = b.mean(0)
    low, order = ((a - middle) @ axes).T.sort(1)
    high = ((b - middle) @ axes).T.sort(1).values
    zero = torch.zeros(directions, 1, dtype=torch.float64)
    integral = torch.cat((zero, high.cumsum(1) / m), 1)
    high = torch.cat((high, zero), 1)
    squares_a, squares_b = low.square(), high.square().sum(1) / m

    def one(counts: Tensor) -> Tensor:
        n = counts.sum()
        shares = counts[order] / n
        levels = m * shares.cumsum(1)
        place = (levels + 1e-9).long().clamp_max(m)  # the levels of b are whole numbers
        upto = integral.gather(1, place) + (levels - place) / m * high.gather(1, place)
        cross = (low * upto.diff(dim=1, prepend=zero)).sum(1)
        squared = (shares * squares_a).sum(1) + squares_b - 2 * cross
        return squared.mean().clamp_min(0).sqrt()

    return lambda counts: torch.stack([one(row) for row in counts])


def unit_vectors(d: int, directions: int) -> Tensor:
    """Directions uniform on the sphere, (d, directions), the same at every call."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.randn(d, directions, generator=generator, dtype=torch.float64)
    return axes / axes.norm(dim=0)


# ---- shared


def gaussian_like(x: Tensor, n: int, seed: int = 0) -> Tensor:
    """n draws from the Gaussian with the mean and full covariance of x (N, *)."""
    rows = x.flatten(1).double()
    values, vectors = torch.linalg.eigh(torch.cov(rows.T))
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, rows.shape[1], generator=generator, dtype=torch.float64)
    draws = rows.mean(0) + z * values.clamp_min(0).sqrt() @ vectors.T
    return draws.to(x.dtype).reshape(n, *x.shape[1:])


def _value(statistic: Statistic, a: Tensor) -> float:
    return float(statistic(torch.ones(1, len(a), dtype=torch.float64)))


def _vectors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    for name, rows in (("a", a), ("b", b)):
        if rows.ndim != 2 or len(rows) < 2:
            raise ShapeError(f"{name} has shape {tuple(rows.shape)}; it must be (N, d), N > 1")
    if a.shape[1] != b.shape[1]:
        raise ShapeError(f"a and b have {a.shape[1]} and {b.shape[1]} columns; they must be alike")
    return a.double(), b.double()
