"""The tensors that the coefficients of a process are made of, for gradients by an adjoint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..sde import SDE


def parameters_of(process: SDE, x: Tensor, ts: Tensor) -> tuple[Tensor, ...]:
    """The leaf tensors that want a gradient and that drift or diffusion look at.

    Both are evaluated once at the first and once at the last time, and their graphs are walked to
    the leaves: a network in a closure, a global or an attribute is found alike, and so is the
    parameter behind a coefficient computed from it. What x itself was made of is left out.
    """
    found: dict[int, Tensor] = {}
    y = x.detach().requires_grad_()
    for t in (ts[0], ts[-1]):
        with torch.enable_grad():
            values = [process.drift(y, t)]
            if not process.deterministic:
                values.append(process.diffusion(y, t))
        for leaf in _leaves(values):
            if leaf is not y:
                found[id(leaf)] = leaf
    return tuple(found.values())


def check_parameters(given: Any) -> None:
    """Refuse what is no tuple of tensors that want gradients."""
    if given is None:
        return
    if not isinstance(given, tuple) or not all(isinstance(p, Tensor) for p in given):
        raise ArgumentError(
            f"parameters ({type(given).__name__}) must be a tuple of tensors, such as "
            "tuple(net.parameters())"
        )


def _leaves(values: Iterable[Tensor]) -> Iterable[Tensor]:
    stack: list[Any] = []
    for value in values:
        if value.grad_fn is not None:
            stack.append(value.grad_fn)
        elif value.requires_grad:
            yield value
    seen = set(stack)
    while stack:
        node = stack.pop()
        if hasattr(node, "variable"):  # where gradients of a leaf accumulate
            yield node.variable
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
