"""Arrays of numbers as data: vectors, embeddings, series, waveforms, images, any state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sdeflow.errors import ArgumentError, all_finite, one_of
from sdeflow.plugins import Factory, hookimpl

from . import SPLITS, Data, checked_labels, checked_split, held_out
from .stored import Held, Stored, existing_file, keys, pick

Normalise = Literal["auto", "none", "unit", "standard"]
Layout = Literal["channels_first", "channels_last", "no_channels"]
CHUNK = 1 << 22
"""Numbers read at a time by the one pass over an array."""


class ArrayData(Data):
    """Rows of an array, each turned into (row - offset) / scale, float32.

    rows: where they are. places: the numbers (n,) of those that belong to this data set.
    labels, class_names, classes: as of `Data`. offset, scale: numbers or tensors that broadcast
    against a sample; `restore` turns samples back.
    layout: how a row is arranged; a sample has its channels first.
    flip: whether the mirror image (along the last axis) of each row is a sample too.
    """

    def __init__(
        self,
        rows: Stored | Held,
        places: Tensor,
        labels: Tensor | None = None,
        class_names: Sequence[str] = (),
        classes: int = 0,
        offset: Tensor | float = 0.0,
        scale: Tensor | float = 1.0,
        layout: str = "channels_first",
        flip: bool = False,
    ) -> None:
        self.rows, self.places, self.layout = rows, places, layout
        self.offset, self.scale = torch.as_tensor(offset), torch.as_tensor(scale)
        shape = arranged(torch.empty((1, *rows.array.shape[1:]), device="meta"), layout).shape[1:]
        views = 2 if flip else 1
        labels = labels.repeat(views) if labels is not None else None
        super().__init__(views * len(places), shape, labels, class_names, classes)

    def sample(self, k: int) -> Tensor:
        return self.batch([k])[0]

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """A whole batch at one go; torch's DataLoader asks for it by this name."""
        return list(self.batch(indices))

    def batch(self, indices: Sequence[int]) -> Tensor:
        """The samples of those numbers, each in 0..n-1, (B, *shape)."""
        view, number = np.divmod(np.asarray(indices), len(self.places))
        x = arranged(self.rows.take(self.places[torch.from_numpy(number)]), self.layout)
        x = (x - self.offset) / self.scale
        for row in view.nonzero()[0]:
            x[row] = x[row].flip(-1)
        return x.contiguous()

    def restore(self, x: Tensor) -> Tensor:
        """Samples (B, *shape) in the units of the file, channels first."""
        return x * self.scale.to(x.device) + self.offset.to(x.device)


def arranged(x: Tensor, layout: str) -> Tensor:
    """Rows (B, *) with their channels first."""
    if layout == "no_channels":
        return x.unsqueeze(1)
    return x.movedim(-1, 1) if layout == "channels_last" and x.ndim > 2 else x


@dataclass
class Moments:
    """What one pass over samples finds: extremes, and mean and variance of each channel."""

    low: float
    high: float
    mean: Tensor
    variance: Tensor


def moments(rows: Stored, places: Tensor, layout: str, spread: bool = True) -> Moments:
    """One pass over the rows at `places`. A NaN or an infinity is an error that names its rows.

    spread: whether more is asked for than that; without, the numbers returned are empty.
    Means and squares are merged chunk by chunk in float64 (Chan, Golub & LeVeque 1979).
    """
    low, high, count = float("inf"), -float("inf"), 0
    mean = square = torch.zeros(())
    wrong: list[int] = []
    for some in _chunks(rows, places):
        x = arranged(rows.take(some), layout)
        if not all_finite(x):
            wrong += some[~x.isfinite().flatten(1).all(1)].tolist()
        if wrong or not spread:
            continue
        x = (x.flatten(2) if x.ndim > 2 else x).double()
        low, high = min(low, float(x.min())), max(high, float(x.max()))
        parts = x.transpose(0, 1).flatten(1)  # (channels, numbers)
        n, centre = parts.shape[1], parts.mean(1)
        gap = centre - mean
        square = (
            square + ((parts - centre[:, None]) ** 2).sum(1) + gap**2 * (count * n) / (count + n)
        )
        mean = mean + gap * n / (count + n)
        count += n
    if wrong:
        few = ", ".join(map(str, wrong[:10])) + (", ..." if len(wrong) > 10 else "")
        raise ArgumentError(
            f"{rows} holds NaN, or numbers beyond float32, in {len(wrong)} of {len(places)} rows: "
            f"{few}; repair or drop them, with x[np.isfinite(x).reshape(len(x), -1).all(1)]"
        )
    return Moments(low, high, mean, square / max(count, 1))


def _chunks(rows: Stored, places: Tensor) -> Iterator[Tensor]:
    size = int(np.prod(rows.array.shape[1:], dtype=np.int64))
    yield from places.split(max(1, CHUNK // max(1, size)))


def arrays(
    split: str = "train",
    path: str = "",
    key: str = "",
    test_path: str = "",
    label_key: str = "labels",
    label_path: str = "",
    classes: int = 0,
    normalise: Normalise = "auto",
    layout: Layout = "channels_first",
    flip: bool = False,
) -> ArrayData:
    """An array of samples (N, *shape) in a .npy, .npz or .safetensors file: any state at all.

    A .npy or .safetensors file is mapped into memory and may be larger than it; a .npz is loaded.
    Floats are read once at the start (about 1 s for 1 GB), and NaN or infinities refused with the
    numbers of their rows. `offset` and `scale` of the data set turn samples back: `restore(x)`.

    Args:
        split: "train" or "test": every tenth row is held out as "test", unless there is test_path.
        path: the file.
        key: the array in a .npz or .safetensors file; "" is the only one beside the labels.
        test_path: a second file of the same form, all of it the "test" split.
        label_key: the array of labels in the same file, whole numbers (N,) from 0 on; none if the
            file has no array `labels`, or with "".
        label_path: a file with the labels of all rows of `path`, such as the .npy beside a .npy.
        classes: their number; 0 is the highest label and one.
        normalise: "auto": whole numbers of 8 and 16 bits from the range of their type to [-1, 1],
            floats as they are; "none": as they are; "unit": from the least and greatest number of
            the training rows to [-1, 1]; "standard": to mean 0 and standard deviation 1, each
            channel (of vectors each component) for itself.
        layout: "channels_first" as a state is, (C, H, W) or (C, L) or (D,); "channels_last";
            "no_channels", (H, W) or (L,), which become (1, H, W) and (1, L).
        flip: whether the mirror image of every training image is a sample too.
    """
    checked_split(split)
    one_of("normalise", normalise, ("auto", "none", "unit", "standard"))
    one_of("layout", layout, ("channels_first", "channels_last", "no_channels"))
    rows = _rows(path, "path", key, label_key, layout)
    n = len(rows.array)
    parts = {part: (rows, held_out(n, part)) for part in SPLITS}
    if test_path:
        other = _rows(test_path, "test_path", key, label_key, layout)
        if other.array.shape[1:] != rows.array.shape[1:] or other.kind != rows.kind:
            raise ArgumentError(f"test_path: {other} must be of the form of path: {rows}")
        if label_path:
            raise ArgumentError("label_path goes with one file; put both arrays into .npz files")
        parts = {"train": (rows, torch.arange(n)), "test": (other, torch.arange(len(other.array)))}
    labels = {part: _labels(parts[part][0], label_key, label_path, classes) for part in SPLITS}
    if (labels["train"] is None) != (labels["test"] is None):
        raise ArgumentError("path and test_path must both have labels, or neither")
    chosen, places = parts[split]
    if not len(places):
        raise ArgumentError(
            f"{chosen} has no row for split={split!r}: every tenth row is held out; give 10 rows "
            "or more, or a test_path"
        )
    offset, scale = _affine(*parts["train"], normalise, layout)
    if split == "test" and _is_float(chosen):
        moments(chosen, places, layout, spread=False)  # for NaN
    of_place, top = None, 0
    if (mine := labels[split]) is not None:
        of_place = mine[places]
        top = max(1 + int(found.max()) for found in labels.values() if found is not None)
    return ArrayData(
        *(chosen, places, of_place, (), classes or top, offset, scale, layout),
        flip=flip and split == "train",
    )


def _rows(path: str, option: str, key: str, label_key: str, layout: str) -> Stored:
    """The array of samples in a file, its form checked."""
    rows = pick(existing_file(path, option), key, "key", label_key)
    shape, kind = tuple(rows.array.shape), rows.kind
    if not (_is_float(rows) or kind == "bool" or kind.startswith(("int", "uint"))):
        raise ArgumentError(f"{rows} must hold numbers: integers or floats")
    if len(shape) < (1 if layout == "no_channels" else 2) or 0 in shape:
        raise ArgumentError(
            f"{rows} must have the shape (N, *shape), with N samples and none of them empty; N "
            "single numbers are x.reshape(N, 1)"
        )
    if kind == "uint8" and layout == "channels_first" and len(shape) == 4:
        if shape[-1] in (1, 3, 4) and shape[1] not in (1, 2, 3, 4):
            raise ArgumentError(f"{rows} looks like images with layout=channels_last; say so")
    return rows


def _is_float(rows: Stored) -> bool:
    return rows.kind.startswith(("float", "bfloat"))


def _labels(rows: Stored, label_key: str, label_path: str, classes: int) -> Tensor | None:
    """The labels of all rows of a file, checked."""
    if label_path:
        found = pick(existing_file(label_path, "label_path"), "", "label_path")
    elif not label_key or (label_key == "labels" and label_key not in keys(rows.path)):
        return None
    else:
        found = pick(rows.path, label_key, "label_key")
    try:
        labels = torch.as_tensor(np.array(found.array))
    except TypeError as error:
        raise ArgumentError(f"{found}: labels must be whole numbers from 0 on") from error
    return checked_labels(labels, len(rows.array), classes, f"labels of {found}")[0]


def _affine(
    rows: Stored, places: Tensor, normalise: str, layout: str
) -> tuple[Tensor | float, Tensor | float]:
    """(offset, scale) of the normalisation; all of a float array is read, for NaN."""
    found = None
    if normalise in ("unit", "standard") or _is_float(rows):
        found = moments(rows, places, layout, normalise in ("unit", "standard"))
    if found is not None and normalise == "unit":
        return (found.high + found.low) / 2, (found.high - found.low) / 2 or 1.0
    if found is not None and normalise == "standard":
        ones = (1,) * (rows.array.ndim - 2 + (layout == "no_channels"))
        spread = found.variance.sqrt()
        spread = torch.where(spread > 1e-6 * found.mean.abs(), spread, 1.0)
        return found.mean.float().reshape(-1, *ones), spread.float().reshape(-1, *ones)
    if normalise == "none" or _is_float(rows):
        return 0.0, 1.0
    if rows.kind == "bool":
        return 0.5, 0.5
    bits = int(rows.kind.lstrip("uint"))
    if bits > 16:
        raise ArgumentError(
            f"{rows}: {rows.kind} does not say what range the numbers have; take normalise=unit "
            "(theirs), standard or none, or save images as uint8"
        )
    half = 2.0 ** (bits - 1)
    return (half - 0.5, half - 0.5) if rows.kind.startswith("u") else (0.0, half)


@hookimpl
def sdeflow_datasets() -> Mapping[str, Factory]:
    return {"arrays": arrays}
