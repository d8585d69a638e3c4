"""Classifier-free guidance of a conditional network, by one condition or several.

Source: Ho & Salimans (2022); Liu et al. (2022, Composable Diffusion).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sdeflow.denoiser import Denoiser
from sdeflow.errors import ArgumentError
from sdeflow.reverse import Score

from .arguments import (
    Label,
    Weight,
    between,
    check_label,
    check_weight,
    known_classes,
    labels_of,
    null_label,
    repeated,
    shaped,
)


@dataclass(frozen=True, eq=False)
class Labelled:
    """A conditional network with its labels closed over: (x, t) -> net(x, t, label)."""

    net: Callable[..., Tensor]
    label: Label

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x, t, labels_of(self.label, x))


@dataclass(frozen=True, eq=False)
class ClassifierFree:
    """(x, t) -> F_null + w (F_class - F_null), one call of the network on [x, x], [label, null]."""

    net: Callable[..., Tensor]
    label: Label
    null: Label
    w: Weight

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        labels = torch.cat((labels_of(self.label, x), labels_of(self.null, x)))
        given, free = self.net(torch.cat((x, x)), repeated(t, 2), labels).chunk(2)
        return between(free, given, self.w)


@dataclass(frozen=True, eq=False)
class Composed:
    """(x, t) -> F_null + sum_k w_k (F_k - F_null), one call of the network for all conditions."""

    net: Callable[..., Tensor]
    labels: tuple[Label, ...]
    null: Label
    w: tuple[Weight, ...]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        n = 1 + len(self.labels)
        labels = torch.cat([labels_of(label, x) for label in (self.null, *self.labels)])
        free, *given = self.net(torch.cat([x] * n), repeated(t, n), labels).chunk(n)
        total = free
        for each, w in zip(given, self.w, strict=True):
            total = total + shaped(w, x) * (each - free)
        return total


def cfg(
    model: Denoiser | Callable[..., Tensor],
    label: Label,
    w: Weight = 1.0,
    *,
    null: Label | None = None,
    convention: str = "scale",
) -> Any:
    """Classifier-free guidance, D_null + w (D_class - D_null): a Denoiser, or a score.

    model: a Denoiser of a conditional network net(x, t, label), or a conditional score of the same
        signature. label: one class, or one a sample. w: a finite number, or one a sample, (B,).
    null: the label that means "no class"; by default `net.classes`.
    convention: "scale" as above, or "ho", (1 + w) D_class - w D_null, as in the paper.

    Each evaluation is one call of the network for a batch of 2 B, which counts once in a
    Solution's `nfe`; where w is the number 1, or 0, of a batch of B. Tensors are best on the device
    of x already: they are sent there at every call. Source: Ho & Salimans (2022), eq. 6.
    """
    net = network_of(model)
    w = check_weight(w, convention)
    null = null_label(net, null)
    check_label("label", label, known_classes(net))
    if isinstance(w, Tensor) or w not in (0, 1):
        return with_network(model, ClassifierFree(net, label, null, w))
    return with_network(model, Labelled(net, label if w else null))


def labelled(model: Denoiser | Callable[..., Tensor], label: Label) -> Any:
    """The conditional model of `label`, without guidance: a Denoiser, or a score."""
    net = network_of(model)
    check_label("label", label, known_classes(net))
    return with_network(model, Labelled(net, label))


def compose(
    model: Denoiser | Callable[..., Tensor],
    labels: Sequence[Label],
    w: Sequence[Weight],
    *,
    null: Label | None = None,
) -> Any:
    """Several conditions at once, D_null + sum_k w_k (D_k - D_null): a Denoiser, or a score.

    A negative weight leads away from its class. Arguments as for `cfg`; each evaluation is one call
    for a batch of (K + 1) B. Source: Liu et al. (2022, Composable Diffusion).
    """
    net = network_of(model)
    if not len(labels) or len(labels) != len(w):
        raise ArgumentError(
            f"labels and w have {len(labels)} and {len(w)} entries; give one weight a condition"
        )
    for label in labels:
        check_label("labels", label, known_classes(net))
    weights = tuple(map(check_weight, w))
    return with_network(model, Composed(net, tuple(labels), null_label(net, null), weights))


def network_of(model: Any) -> Callable[..., Tensor]:
    """What takes the label: the network of a Denoiser, or a score."""
    net = model.net if isinstance(model, Denoiser) else model
    if not callable(net):
        raise ArgumentError(f"model={model!r} must be a Denoiser, or callable as (x, t, label)")
    if known_classes(net) == 0:
        raise ArgumentError(
            f"{type(net).__name__} is unconditional (classes = 0): it knows no class to be guided "
            "by; train a conditional one"
        )
    return net


def with_network(model: Any, net: Score) -> Any:
    """The Denoiser with another network; or that score itself."""
    return replace(model, net=net) if isinstance(model, Denoiser) else net
