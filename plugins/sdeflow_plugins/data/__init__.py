"""Data sets behind the `sdeflow_datasets` hook: float32 samples of one shape, in random access.

A data set answers `[i]` for any i at any time, and always with the same numbers: nothing is drawn
while it is read. The order of training is then a function of (seed, step) alone, and a resumed run
sees what the unbroken one would have seen. A mirror image or another crop is a sample of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sdeflow.errors import ArgumentError, one_of

SPLITS = ("train", "test")


class Data(Dataset[Tensor]):
    """A data set: n samples, float32 and of one shape, and maybe a label for each.

    A subclass says in `sample(k)` what sample k is. `[i]` follows the rules of a Python sequence:
    -1 is the last one, an index beyond the end is an IndexError. It never returns the label, which
    stands in `labels[i]`.

    n: the number of samples. shape: that of one.
    labels: whole numbers (n,) in 0..classes-1, or None.
    class_names: what the classes are called, in order; empty where that is not known.
    classes: their number; left out, that of the names, or the highest label and one.

    Attributes: shape, labels, classes (0: unlabelled), class_names.
    """

    def __init__(
        self,
        n: int,
        shape: Sequence[int],
        labels: Tensor | None = None,
        class_names: Sequence[str] = (),
        classes: int = 0,
    ) -> None:
        self.n = n
        self.shape = tuple(shape)
        self.labels = labels
        self.class_names = list(class_names) if labels is not None else []
        self.classes = 0
        if labels is None and classes:
            raise ArgumentError(f"classes={classes}, and there are no labels; leave classes out")
        if labels is not None:
            self.labels, self.classes = checked_labels(labels, n, classes or len(class_names))

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Tensor:
        k = operator.index(index)
        if not -self.n <= k < self.n:
            raise IndexError(f"index={k} must be in 0..{self.n - 1}")
        return self.sample(k % self.n)

    def sample(self, k: int) -> Tensor:
        """Sample k, 0 <= k < n."""
        raise NotImplementedError


class TensorData(Data):
    """A data set held as one tensor.

    x: the samples, (N, *shape), in [-1, 1].
    labels, class_names, classes: as of `Data`.
    """

    def __init__(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        class_names: Sequence[str] = (),
        classes: int = 0,
    ) -> None:
        super().__init__(len(x), x.shape[1:], labels, class_names, classes)
        self.x = x

    def sample(self, k: int) -> Tensor:
        return self.x[k]

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """A whole batch at one go; torch's DataLoader asks for it by this name."""
        return list(self.x[torch.as_tensor(indices)])


def checked_split(split: str) -> str:
    """`split` if it is "train" or "test"."""
    return one_of("split", split, SPLITS)


def held_out(n: int, split: str) -> Tensor:
    """The places of a split among n things in order: every tenth one is held out as "test"."""
    place = torch.arange(n)
    return place[(place % 10 == 9) == (split == "test")]


def checked_labels(
    labels: Any, n: int, classes: int = 0, name: str = "labels"
) -> tuple[Tensor, int]:
    """Labels as whole numbers (n,) in 0..classes-1, and the number of classes.

    classes: 0 takes the highest label and one, if the labels are not fewer than that.
    """
    found = torch.as_tensor(labels)
    if found.dtype.is_floating_point or found.dtype.is_complex or found.dtype == torch.bool:
        raise ArgumentError(
            f"{name} are {found.dtype}, such as {found.flatten()[:3].tolist()}; they must be whole "
            "numbers from 0 on: convert them with astype('int64')"
        )
    if tuple(found.shape) != (n,):
        hint = "; of one-hot rows take argmax(1)" if found.ndim == 2 else ""
        raise ArgumentError(
            f"{name} have shape {tuple(found.shape)} and must have ({n},), one a sample{hint}"
        )
    found = found.long()
    highest = int(found.max()) if n else -1
    if not classes and highest >= max(n, 2):
        raise ArgumentError(
            f"{name} reach {highest}, with {n} samples; number the classes from 0 on without gaps, "
            "or say how many there are with the option classes"
        )
    top = classes or highest + 1
    wrong = ((found < 0) | (found >= top)).nonzero().flatten()
    if len(wrong):
        few = ", ".join(f"{int(found[row])} in row {int(row)}" for row in wrong[:5])
        raise ArgumentError(
            f"{name} must lie in 0..{top - 1}; {len(wrong)} of {n} do not: {few}"
            f"{', ...' if len(wrong) > 5 else ''}"
        )
    return found, top
