"""MNIST and Fashion-MNIST, from a local folder of IDX files."""

from __future__ import annotations

import gzip
import zlib
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

CLASSES = {
    "mnist": [str(digit) for digit in range(10)],
    "fashion_mnist": "top trouser pullover dress coat sandal shirt sneaker bag boot".split(),
}
PREFIX = {"train": "train", "test": "t10k"}


def _of(name: str, title: str) -> Factory:
    def build(split: str = "train", path: str = "", pad: int = 0) -> ArrayData:
        checked_split(split)
        if isinstance(pad, bool) or not isinstance(pad, int) or pad < 0:
            raise ArgumentError(f"pad={pad!r} must be a whole number >= 0, such as 2")
        root = existing_folder(path, "IDX file")
        pixels = _idx(root, f"{PREFIX[split]}-images", 3)
        labels = _idx(root, f"{PREFIX[split]}-labels", 1)
        pixels = np.pad(pixels, ((0, 0), (pad, pad), (pad, pad)))
        held = Held(torch.from_numpy(pixels[:, None]))
        of_image = torch.from_numpy(labels.astype(np.int64))
        return ArrayData(held, torch.arange(len(pixels)), of_image, CLASSES[name], 10, 127.5, 127.5)

    build.__name__ = build.__qualname__ = name
    build.ink = name == "mnist"  # type: ignore[attr-defined]
    build.__doc__ = f"""{title} from a local folder of IDX files, (1, 28, 28), 10 classes.

    The folder holds train-images-idx3-ubyte, train-labels-idx1-ubyte and the same of t10k, each
    as it is or with .gz. Grey, from -1 (ground) to 1.

    Args:
        split: "train" (60,000 images) or "test" (10,000).
        path: the folder.
        pad: pixels of ground put around each image; with 2 it is 32 x 32.
    """
    return build


def _idx(root: Path, stem: str, axes: int) -> np.ndarray:
    """The array of an IDX file of bytes: magic 0 0 8 axes, the sizes (big-endian), the numbers."""
    names = [f"{stem}{dot}idx{axes}-ubyte{end}" for end in ("", ".gz") for dot in "-."]
    file = next((root / name for name in names if (root / name).is_file()), None)
    if file is None:
        raise ArgumentError(f"path={str(root)!r} has none of {', '.join(names)}")
    try:
        content = file.read_bytes()
        content = gzip.decompress(content) if file.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise ArgumentError(f"{file} cannot be unpacked ({error}); fetch it again") from error
    if content[:4] != bytes([0, 0, 8, axes]) or len(content) < 4 + 4 * axes:
        raise ArgumentError(f"{file} is no IDX file of bytes with {axes} axes; fetch it again")
    sizes = np.frombuffer(content, ">u4", axes, 4)
    if len(content) != 4 + 4 * axes + np.prod(sizes, dtype=np.int64):
        raise ArgumentError(f"{file} is not as long as its header says; fetch it again")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(sizes)


@hookimpl
def sdeflow_datasets() -> Mapping[str, Factory]:
    return {
        "mnist": _of("mnist", "MNIST, handwritten digits,"),
        "fashion_mnist": _of("fashion_mnist", "Fashion-MNIST"),
    }
