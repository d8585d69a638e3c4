"""Data sets behind the `sdeflow_datasets` hook: tensors in [-1, 1], all of one shape.

Every data set has `shape`, that of one sample; one whose samples fit in memory is a `TensorData`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sdeflow.errors import one_of

SPLITS = ("train", "test")


class TensorData(Dataset[Tensor]):
    """A data set held as one tensor.

    x: the samples, (N, *shape), in [-1, 1].
    labels: whole numbers (N,), or None where there are none.
    """

    def __init__(self, x: Tensor, labels: Tensor | None = None) -> None:
        self.x = x
        self.labels = labels
        self.shape = tuple(x.shape[1:])

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        return self.x[index]

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """A whole batch at one go; torch's DataLoader asks for it by this name."""
        return list(self.x[torch.as_tensor(indices)])


def checked_split(split: str) -> str:
    """`split` if it is "train" or "test"."""
    return one_of("split", split, SPLITS)
