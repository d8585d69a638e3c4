"""Real data to compare with: a fixed random selection of a data set, or all of it in batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..data import TensorData

BATCH = 512


def whole(data: Any, most: int = 5000) -> Tensor:
    """At most so many samples of a data set as one tensor: all, or a fixed random selection."""
    return take(data, selection(len(data), most))


def selection(n: int, most: int) -> Tensor:
    """Places of min(n, most) of n samples, in order; the same at every call."""
    if n <= most:
        return torch.arange(n)
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(n, generator=generator)[:most].sort().values


def take(data: Any, places: Tensor) -> Tensor:
    """The samples at these places, (n, *)."""
    if isinstance(data, TensorData):
        return data.x[places]
    return torch.stack([data[int(k)] for k in places])


def batches(data: Any) -> Iterator[Tensor]:
    """All samples in order, some at a time: a large data set never stands in memory whole."""
    for places in torch.arange(len(data)).split(BATCH):
        yield take(data, places)


def labels_of(data: Any) -> Tensor | None:
    """The labels of a data set, whole numbers (N,); None where it has none."""
    labels = getattr(data, "labels", None)
    return None if labels is None or not len(labels) else torch.as_tensor(labels)
