"""Noise of a stranger's code, replaced: every normal that it draws from torch comes from the test.

Only so can a sampler that calls `torch.randn` itself be run on unit vectors of noise, or twice on
the same noise in batches of another size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import ArgumentError

NORMALS: frozenset[Callable[..., Any]] = frozenset(
    (torch.randn, torch.randn_like, torch.normal, torch.Tensor.normal_)
)


class Intercept(TorchFunctionMode, ABC):
    """A context in which the normals drawn from torch are those of `draw(index, shape)`.

    The index counts the draws of a run. Two draws from equal generator states are one and the
    same draw, as they are without the context: that is how a Brownian tree remembers its path.
    torch.normal and Tensor.normal_ keep their mean and standard deviation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[bytes, int] = {}
        self.shapes: set[tuple[int, ...]] = set()

    @property
    def draws(self) -> int:
        """How many different draws there have been."""
        return len(self.seen)

    @abstractmethod
    def draw(self, index: int, shape: tuple[int, ...]) -> Tensor:
        """Unit normals of this shape: those of the `index`-th draw."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in NORMALS:
            return func(*args, **kwargs)
        generator = kwargs.get("generator") or torch.default_generator
        state = generator.get_state().numpy().tobytes()
        made = func(*args, **kwargs)  # moves the generator on; its shape, dtype and device count
        index = self.seen.setdefault(state, len(self.seen))
        self.shapes.add(tuple(made.shape))
        z = self.draw(index, tuple(made.shape)).to(dtype=made.dtype, device=made.device)
        if func in (torch.randn, torch.randn_like):
            return z
        first = 1 if func is torch.Tensor.normal_ else 0
        mean, std = (
            args[i] if len(args) > i else kwargs.get(name, default)
            for i, name, default in ((first, "mean", 0.0), (first + 1, "std", 1.0))
        )
        z = mean + std * z
        return made.copy_(z) if func is torch.Tensor.normal_ else z


class Fixed(Intercept):
    """Normals that are a function of the draw and the row: the same in a batch of any size."""

    def draw(self, index: int, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        rows, *rest = shape or (1,)
        block = torch.randn(max(rows, 64), *rest, dtype=torch.float64, generator=generator)
        return block[:rows].reshape(shape)


class UnitVectors(Intercept):
    """Draw j is one in row 3 + j, cos(j) in row 2 and zero elsewhere, for states (rows, width)."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.rows, self.width = rows, width

    def draw(self, index: int, shape: tuple[int, ...]) -> Tensor:
        if shape != (self.rows, self.width):
            raise ArgumentError(
                f"the sampler draws noise of shape {shape} for states {(self.rows, self.width)}; "
                "its law can be read off where each number of the state has its own noise"
            )
        z = torch.zeros(shape, dtype=torch.float64)
        if 3 + index < self.rows:
            z[3 + index], z[2] = 1, math.cos(index)
        return z
