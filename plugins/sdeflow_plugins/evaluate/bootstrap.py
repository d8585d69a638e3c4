"""Error bars by the bootstrap: how far a figure moves when its items are drawn again.

A `Statistic` sees its n items through counts alone, how often each was drawn: features are computed
once, and a replicate costs one weighted mean. The value is that of the counts 1, 1, ..., 1; the
error is the standard deviation over replicates that draw n items with replacement. (The standard
deviation, not percentiles: a distance between clouds grows when points repeat, so the replicates
lie above the value, but their spread is right.)

Two figures measured on the same items with the same seed have the same draws: their difference is
paired, and its error leaves out what the two share.

Source: Efron & Tibshirani (1993), An Introduction to the Bootstrap, chapter 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.errors import ArgumentError, ShapeError, positive_int

Statistic = Callable[[Tensor], Tensor]
"""counts (R, n), float64, each row summing to n -> values (R,)."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its error bar.

    value: that of the items as they are. error: one standard error, NaN where it is not known.
    replicates: the figure of each draw, (R,).
    """

    value: float
    error: float
    replicates: Tensor

    def plain(self) -> dict[str, float | None]:
        """Value and error as JSON takes them: a number that is not finite is None."""
        pair = {"value": self.value, "error": self.error}
        return {name: x if math.isfinite(x) else None for name, x in pair.items()}


def draws(n: int, replicates: int, seed: int = 0) -> Tensor:
    """How often each of n items is drawn in each replicate, (R, n): n draws with replacement."""
    generator = torch.Generator().manual_seed(seed)
    shape = (check_replicates(replicates), n)
    index = torch.randint(n, shape, generator=generator)
    return torch.zeros(shape, dtype=torch.float64).scatter_add_(
        1, index, torch.ones(shape, dtype=torch.float64)
    )


def estimate(statistic: Statistic, n: int, replicates: int = 200, seed: int = 0) -> Estimate:
    """The statistic of n items with its bootstrap error."""
    value = float(statistic(torch.ones(1, n, dtype=torch.float64)))
    values = statistic(draws(n, replicates, seed))
    return Estimate(value, float(values.std()), values)


def check_replicates(replicates: int) -> int:
    """`replicates` if it is a whole number >= 2: a spread needs two."""
    if positive_int("replicates", replicates) < 2:
        raise ArgumentError(
            "replicates=1 must be at least 2, such as 200: an error bar is a spread"
        )
    return replicates


def mean_of(values: Tensor) -> Statistic:
    """The mean of one number for each item, such as a share of hits."""
    if values.ndim != 1 or not len(values):
        raise ShapeError(f"values has shape {tuple(values.shape)}; it must be (n,), n > 0")
    each = values.double()
    return lambda counts: counts @ each / counts.sum(1)


def difference(a: Estimate, b: Estimate) -> tuple[float, float]:
    """(a - b, its standard error) of two figures measured on the same draws."""
    if a.replicates.shape != b.replicates.shape:
        raise ShapeError(
            f"replicates of shapes {tuple(a.replicates.shape)} and {tuple(b.replicates.shape)} "
            "are not paired; measure both with the same number and seed"
        )
    return a.value - b.value, float((a.replicates - b.replicates).std())
