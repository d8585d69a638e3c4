"""Memorisation: are the samples new, or copies of training data?

d_1 and d_2 are the Euclidean distances of a state to its nearest and second nearest training
states. Held-out data, which nobody could copy, say what is usual.

    nearer      P(d_1 of a sample < d_1 of a held-out state), ties half: 0.5 for samples as far from
                the training data as new data are, 1 for copies. The Mann-Whitney statistic of
                Meehan et al. (2020), section 3.
    memorised   share of samples with d_1 < d_2 / 3: much nearer to one training state than to any
                other. Yoon et al. (2023), section 2; Gu et al. (2023).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.errors import ShapeError

COPY = 1 / 3
"""A sample nearer to one training state than this share of the way to the next is a copy."""


@dataclass(frozen=True)
class Nearest:
    """The two nearest training states of each state.

    distances: (n, 2), the nearer first. index: (n, 2), their places in the training data.
    """

    distances: Tensor
    index: Tensor

    @property
    def copies(self) -> Tensor:
        """Which states count as copies, (n,)."""
        return self.distances[:, 0] < COPY * self.distances[:, 1]


def nearest(x: Tensor, training: Tensor | Iterable[Tensor]) -> Nearest:
    """The two nearest training states of each x (n, *); `training` whole, or batch by batch."""
    x = x.flatten(1).double()
    gaps = torch.full((len(x), 2), torch.inf, dtype=torch.float64)
    index = torch.zeros(len(x), 2, dtype=torch.long)
    seen = 0
    for batch in training.split(1024) if isinstance(training, Tensor) else training:
        rows = batch.flatten(1).double()
        if rows.shape[1] != x.shape[1]:
            raise ShapeError(
                f"training states have {rows.shape[1]} numbers, the samples {x.shape[1]}"
            )
        # Differences, not a matrix product: of a copy the distance is 0, not the root of rounding.
        found = torch.cdist(x, rows, compute_mode="donot_use_mm_for_euclid_dist")
        both = torch.cat((gaps, found), 1)
        places = torch.cat((index, seen + torch.arange(len(rows)).expand(len(x), -1)), 1)
        gaps, order = both.topk(2, largest=False)
        index = places.gather(1, order)
        seen += len(rows)
    if seen < 2:
        raise ShapeError(f"{seen} training states have no nearest two; give at least 2")
    return Nearest(gaps, index)


def nearer(samples: Nearest, held_out: Nearest) -> Tensor:
    """For each sample the share of held-out states that lie farther from the training data, (n,).

    Their mean is P(d_1 of a sample < d_1 of a held-out state), ties half.
    """
    theirs = held_out.distances[:, 0].contiguous().sort().values
    ours = samples.distances[:, 0].contiguous()
    at_most = torch.searchsorted(theirs, ours, right=True)
    less = torch.searchsorted(theirs, ours)
    return 1 - (at_most + less).double() / (2 * len(theirs))
