"""CIFAR-10 in its binary version, from a local folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from sdeflow.errors import ArgumentError
from sdeflow.plugins import Factory, hookimpl

from . import checked_split
from .arrays import ArrayData
from .stored import Held
from .tree import existing_folder

RECORD = 1 + 3 * 32 * 32
"""Bytes of an image: the label, then 32 rows of red, of green, of blue."""
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
FILES = {"train": [f"data_batch_{k}.bin" for k in range(1, 6)], "test": ["test_batch.bin"]}


def cifar10(split: str = "train", path: str = "", flip: bool = True) -> ArrayData:
    """CIFAR-10, its binary version in a local folder: 50,000 images (3, 32, 32) of 10 classes.

    The folder holds data_batch_1.bin to data_batch_5.bin and test_batch.bin, in records of 3,073
    bytes, and batches.meta.txt with the names of the classes. It is read into memory as bytes (154
    MB). Source: Krizhevsky (2009), https://www.cs.toronto.edu/~kriz/cifar.html, "binary version".

    Args:
        split: "train" (50,000 images) or "test" (10,000).
        path: the folder, or the one above it.
        flip: whether the mirror image of every training image is a sample too.
    """
    checked_split(split)
    root = existing_folder(path, "CIFAR-10 file")
    if (root / "cifar-10-batches-bin").is_dir():
        root /= "cifar-10-batches-bin"
    records = np.concatenate([_records(root, name) for name in FILES[split]])
    pixels = torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32))
    meta = root / "batches.meta.txt"
    names = meta.read_text(encoding="utf-8").split() if meta.is_file() else CLASSES
    return ArrayData(
        Held(pixels),
        torch.arange(len(pixels)),
        torch.from_numpy(records[:, 0].astype(np.int64)),
        names,
        offset=127.5,
        scale=127.5,
        flip=flip and split == "train",
    )


def _records(root: Path, name: str) -> np.ndarray:
    """The records of a file, (n, 3073)."""
    file = root / name
    if not file.is_file():
        pickled = (root / name.removesuffix(".bin")).is_file()
        hint = "what is there is the Python version, pickled; " if pickled else ""
        raise ArgumentError(
            f"path={str(root)!r} has no {name}; {hint}unpack cifar-10-binary.tar.gz and give its "
            "folder cifar-10-batches-bin"
        )
    size = file.stat().st_size
    if size % RECORD or not size:
        raise ArgumentError(
            f"{file} has {size:,} bytes, which are not whole records of {RECORD:,} (10,000 of them "
            "make 30,730,000 bytes); it was cut off: unpack it again"
        )
    records = np.fromfile(file, np.uint8).reshape(-1, RECORD)
    wrong = np.flatnonzero(records[:, 0] > 9)
    if len(wrong):
        raise ArgumentError(
            f"{file}: {len(wrong)} of {len(records)} records have a label beyond 9, such as "
            f"{records[wrong[0], 0]} in record {wrong[0]}; it is damaged, or of another data set "
            "(CIFAR-100 has two labels a record)"
        )
    return records


@hookimpl
def sdeflow_datasets() -> Mapping[str, Factory]:
    return {"cifar10": cifar10}
