"""Symbols: linear combinations that stand in for tensors while a solver's step is traced.

A symbol supports what a linear step does with a state: sums, differences, multiples by numbers and
0-dim tensors, `torch.lerp`. Anything else raises `NotLinear`, and the step keeps its plain loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class NotLinear(Exception):
    """A step did something with a symbol that is not a linear combination."""


class Symbol:
    """A linear combination of the registers of one step, standing in for a tensor."""

    __slots__ = ("frame", "terms")

    def __init__(self, terms: dict[int, float], frame: object) -> None:
        self.terms, self.frame = terms, frame

    def _plus(self, other: Any, scale: float = 1.0) -> Symbol:
        if not isinstance(other, Symbol) or other.frame is not self.frame:
            raise NotLinear("a sum with something that is not linear in this step's quantities")
        terms = dict(self.terms)
        for i, c in other.terms.items():
            terms[i] = terms.get(i, 0.0) + scale * c
        return Symbol(terms, self.frame)

    def _times(self, scale: Any) -> Symbol:
        c = _scalar(scale)
        return Symbol({i: c * own for i, own in self.terms.items()}, self.frame)

    def __add__(self, other: Any) -> Symbol:
        return self if _is_zero(other) else self._plus(other)

    def __sub__(self, other: Any) -> Symbol:
        return self if _is_zero(other) else self._plus(other, -1.0)

    def __rsub__(self, other: Any) -> Symbol:
        return (-self) + other

    def __neg__(self) -> Symbol:
        return self._times(-1.0)

    def __mul__(self, scale: Any) -> Symbol:
        return self._times(scale)

    def __truediv__(self, scale: Any) -> Symbol:
        c = _scalar(scale)
        return self._times(1.0 / c if c else math.inf)

    __radd__, __rmul__ = __add__, __mul__

    def lerp(self, end: Any, weight: Any) -> Symbol:
        return self + _scalar(weight) * (end - self)

    def clone(self) -> Symbol:
        return self

    detach = clone

    def __getattr__(self, name: str) -> Any:
        raise NotLinear(f"the step uses .{name} of a state, which a trace does not follow")

    def __bool__(self) -> bool:
        raise NotLinear("the step branches on a state")

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """0-dim tensor * symbol, torch.lerp(symbol, ...) and their like arrive here."""
        name = func.__name__.strip("_").rstrip("_")
        if name in _TORCH and not kwargs:
            return _TORCH[name](*args)
        raise NotLinear(f"the step calls torch's {func.__name__} on a state")


_TORCH: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: b + a,
    "radd": lambda a, b: b + a,
    "sub": lambda a, b: a - b if isinstance(a, Symbol) else -b + a,
    "rsub": lambda a, b: b - a if isinstance(b, Symbol) else -a + b,
    "mul": lambda a, b: b * a if isinstance(b, Symbol) else a * b,
    "rmul": lambda a, b: b * a if isinstance(b, Symbol) else a * b,
    "div": lambda a, b: a / b if isinstance(a, Symbol) else _refuse(),
    "truediv": lambda a, b: a / b if isinstance(a, Symbol) else _refuse(),
    "true_divide": lambda a, b: a / b if isinstance(a, Symbol) else _refuse(),
    "neg": lambda a: -a,
    "negative": lambda a: -a,
    "lerp": lambda a, b, w: a.lerp(b, w),
    "zeros_like": lambda a: a * 0.0,
    "clone": lambda a: a,
    "detach": lambda a: a,
}


def _refuse() -> Any:
    raise NotLinear("the step divides by a state")


def _scalar(value: Any) -> float:
    if isinstance(value, Tensor):
        if value.ndim or (value.requires_grad and torch.is_grad_enabled()):
            raise NotLinear("a coefficient is not a plain number")
        return float(value)
    if isinstance(value, Symbol):
        raise NotLinear("the step multiplies two states")
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise NotLinear(f"a coefficient is a {type(value).__name__}") from error


def _is_zero(value: Any) -> bool:
    return not isinstance(value, Symbol | Tensor) and value == 0
