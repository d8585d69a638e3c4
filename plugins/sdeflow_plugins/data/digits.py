"""The handwritten digits that come with scikit-learn: 1,797 images of 8 x 8, no download."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sdeflow.errors import ArgumentError
from sdeflow.plugins import Factory, hookimpl

from . import TensorData, checked_split

DIGITS = [str(digit) for digit in range(10)]


class Digits(TensorData):
    """Handwritten digits 0 to 9, (1, 8, 8), grey; 17 levels from -1 (paper) to 1 (ink).

    The split is fixed, random and stratified by class: a quarter of each class is held out.
    `ink` says that 1 is drawn dark. A label is the digit itself and there are always ten classes,
    so that class 3 means the digit 3 whatever `only` keeps.

    Args:
        split: "train" (1,347 images) or "test" (450).
        only: the digits to keep, such as [3, 8]; all of them if empty.

    Source: Alpaydin & Kaynak (1998), UCI Optical Recognition of Handwritten Digits, test part.
    """

    ink = True

    def __init__(self, split: str = "train", only: tuple[int, ...] = ()) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        checked_split(split)
        if any(digit not in range(10) for digit in only):
            raise ArgumentError(f"only={list(only)} must hold digits from 0 to 9, such as [3, 8]")
        pixels, classes = load_digits(return_X_y=True)
        halves = train_test_split(pixels, classes, test_size=0.25, random_state=0, stratify=classes)
        pixels, classes = halves[split == "test"], halves[2 + (split == "test")]
        x = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
        labels = torch.as_tensor(classes, dtype=torch.long)
        if only:
            kept = torch.isin(labels, torch.tensor(list(only)))
            x, labels = x[kept], labels[kept]
        super().__init__(x, labels, DIGITS)


@hookimpl
def sdeflow_datasets() -> Mapping[str, Factory]:
    return {"digits": Digits}
