"""Labels and weights of guidance: how they are checked, and made ready for a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from sdeflow.errors import ArgumentError, ShapeError, one_of, whole

Label = int | Tensor
"""One class for the batch, or one a sample, (B,) whole numbers."""
Weight = float | Tensor
"""One weight for the batch, or one a sample, (B,)."""

CONVENTIONS: dict[str, Callable[[Any], Any]] = {
    # name     its w in ours           the formula
    "scale": lambda w: w,  #           D_null + w (D_class - D_null): w = 1 is the class alone
    "ho": lambda w: 1 + w,  #          (1 + w) D_class - w D_null: w = 0 is. Ho & Salimans, eq. 6
}


def check_weight(w: Any, convention: str = "scale") -> Weight:
    """w, finite, one number or one a sample, in the convention "scale"."""
    ours = CONVENTIONS[one_of("convention", convention, CONVENTIONS)]
    if isinstance(w, Tensor):
        if w.ndim > 1 or not w.is_floating_point() or not bool(w.isfinite().all()):
            raise ArgumentError(
                f"w has shape {tuple(w.shape)} and dtype {w.dtype}; it must be one finite number, "
                "or one a sample: (B,)"
            )
        return ours(w if w.ndim else float(w))
    if isinstance(w, bool) or not isinstance(w, Real) or not math.isfinite(w):
        raise ArgumentError(f"w={w!r} must be a finite number, or a tensor (B,) of them")
    return ours(float(w))


def check_label(name: str, label: Any, classes: int | None) -> None:
    """Refuse a label that is no whole number(s) in 0..classes, `classes` itself meaning none."""
    if isinstance(label, Tensor):
        if label.ndim > 1 or label.is_floating_point() or label.dtype == torch.bool:
            raise ArgumentError(
                f"{name} has shape {tuple(label.shape)} and dtype {label.dtype}; it must be one "
                "class, or one a sample: (B,) whole numbers"
            )
        ends = [int(end) for end in label.aminmax()] if label.numel() else []
    else:
        number = whole(label)
        if number is None:
            raise ArgumentError(f"{name}={label!r} must be a whole number, or a tensor of them")
        ends = [number]
    for end in ends:
        if end < 0 or (classes is not None and end > classes):
            rule = "0 or more" if classes is None else f"in 0..{classes - 1}, or {classes} for none"
            raise ArgumentError(f"{name} holds class {end}; it must be {rule}")


def known_classes(net: Any) -> int | None:
    """The number of classes of a network that tells it: 0 if it is unconditional."""
    return whole(getattr(net, "classes", None))


def null_label(net: Any, null: Label | None = None) -> Label:
    """The label that means "no class" to a network: `null`, or else `net.classes`."""
    if null is not None:
        check_label("null", null, None)
        return null
    classes = known_classes(net)
    if not classes:
        raise ArgumentError(
            f"{type(net).__name__} has no classes to be guided by: train a conditional network, or "
            "name the label that means none: null=..."
        )
    return classes


def labels_of(label: Label, x: Tensor) -> Tensor:
    """One label a sample, (B,), on the device of x."""
    if not isinstance(label, Tensor):
        return torch.full((x.shape[0],), label, dtype=torch.long, device=x.device)
    if label.ndim and label.shape[0] != x.shape[0]:
        raise ShapeError(f"label has {label.shape[0]} entries for a batch of {x.shape[0]}")
    return label.to(device=x.device, dtype=torch.long).expand(x.shape[0])


def shaped(w: Weight, x: Tensor) -> Weight:
    """w, ready to multiply x."""
    if not isinstance(w, Tensor):
        return w
    if w.shape[0] != x.shape[0]:
        raise ShapeError(f"w has {w.shape[0]} entries for a batch of {x.shape[0]}")
    return w.to(dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 1))


def between(free: Tensor, given: Tensor, w: Weight) -> Tensor:
    """free + w (given - free); exactly `given` at w = 1 and `free` at w = 0."""
    return torch.lerp(free, given, shaped(w, free))


def repeated(t: Tensor, n: int) -> Tensor:
    """t for n batches side by side; a 0-dim time serves them all."""
    return torch.cat([t] * n) if t.ndim else t
