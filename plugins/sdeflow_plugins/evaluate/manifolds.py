"""Precision and recall, density and coverage: do samples lie where the data lie, and everywhere?

The manifold of a set is the union of balls around its points, each as large as the distance to the
point's k-th nearest neighbour within the set.

    precision  share of samples inside the manifold of the data
    recall     share of data inside the manifold of the samples
    density    number of data balls that a sample lies in, over k: 1 for equal laws, may exceed 1
    coverage   share of data balls that hold a sample: 1 - 2^-k for equal laws and large equal sets

Precision and recall follow Kynkaanniemi et al. (2019), eq. 1 and 2, k = 3; density and coverage
Naeem et al. (2020), section 3, k = 5: less moved by outliers of the data.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sdeflow.errors import ArgumentError, ShapeError, positive_int

ROWS = 1024


class Manifolds(NamedTuple):
    """One number for each point; their means are the four figures.

    precision, density: (n,), for each sample. recall, coverage: (m,), for each data point.
    """

    precision: Tensor
    recall: Tensor
    density: Tensor
    coverage: Tensor


def manifolds(samples: Tensor, data: Tensor, k: int = 3, k_density: int = 5) -> Manifolds:
    """Precision, recall, density and coverage of samples (n, d) against data (m, d)."""
    for name, rows in (("samples", samples), ("data", data)):
        if rows.ndim != 2 or len(rows) <= max(k, k_density):
            raise ShapeError(
                f"{name} has shape {tuple(rows.shape)}; it must be (N, d) with more than "
                f"{max(k, k_density)} rows, for their nearest neighbours"
            )
    samples, data = samples.double(), data.double()
    ball_data, ball_density = neighbour_radii(data, (k, k_density))
    (ball_samples,) = neighbour_radii(samples, (k,))
    precision, density, nearest = [], [], torch.full((len(data),), torch.inf, dtype=torch.float64)
    recall = torch.zeros(len(data), dtype=torch.bool)
    for part, ball in zip(samples.split(ROWS), ball_samples.split(ROWS), strict=True):
        gaps = torch.cdist(part, data)
        precision.append((gaps <= ball_data).any(1))
        density.append((gaps <= ball_density).sum(1) / k_density)
        recall |= (gaps <= ball[:, None]).any(0)
        nearest = torch.minimum(nearest, gaps.amin(0))
    return Manifolds(
        torch.cat(precision).double(),
        recall.double(),
        torch.cat(density).double(),
        (nearest <= ball_density).double(),
    )


def neighbour_radii(x: Tensor, ks: tuple[int, ...]) -> list[Tensor]:
    """The distance of each point of x (n, d) to its k-th nearest other point, for each k: (n,)."""
    for k in ks:
        if positive_int("k", k) >= len(x):
            raise ArgumentError(f"k={k} must be less than the {len(x)} points")
    found = []
    for start in range(0, len(x), ROWS):
        gaps = torch.cdist(x[start : start + ROWS], x)
        rows = torch.arange(len(gaps))
        gaps[rows, start + rows] = torch.inf  # a point is no neighbour of itself
        found.append(gaps.topk(max(ks), largest=False).values)
    radii = torch.cat(found)
    return [radii[:, k - 1] for k in ks]
