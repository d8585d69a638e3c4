"""Terms of an SDE seen as functions to be examined, and the coefficients read off linear ones.

For f(x, t) = F(t) x + c(t) and g(x, t) = g(t) the coefficients are values of f and g themselves, at
x = 0, at x = 1 and at unit vectors: nothing is fitted, and gradients reach whatever f and g are
made of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import ShapeError
from .probe import directions
from .sde import SDE

Structure = Literal["scalar", "elementwise", "matrix"]
LARGEST = 256
"""Up to this size of a state the whole Jacobian is looked at; beyond, products with random states.
"""
CHUNK = 2**22
"""Numbers in one call of the user's function, at most."""


@dataclass(frozen=True)
class Term:
    """The drift or the diffusion of an SDE at states (n, *shape) of one dtype.

    A call returns (n, *shape), or (n, *shape, m) for matrix noise, whatever the user's function
    broadcasts; t is () or (n,).
    """

    sde: SDE
    which: Literal["drift", "diffusion"]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    batched: bool = False
    """Whether t may be (B,); else it is given one time at a time."""

    def __str__(self) -> str:
        return f"the {self.which} of {type(self.sde).__name__}"

    @property
    def like(self) -> Tensor:
        """An empty tensor of the dtype and device of the states."""
        return torch.empty((), dtype=self.dtype, device=self.device)

    @property
    def is_matrix(self) -> bool:
        """Whether it returns matrices."""
        return self.which == "diffusion" and self.sde.noise == "matrix"

    def raw(self, x: Tensor, t: Tensor) -> Tensor:
        """The user's function."""
        return getattr(self.sde, self.which)(x, t.to(x.dtype))

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        try:
            out = self.raw(x, t)
            out = out if isinstance(out, Tensor) else torch.as_tensor(out, dtype=x.dtype)
        except Exception as error:
            raise ShapeError(
                f"{self} raises {type(error).__name__} for x of shape {tuple(x.shape)} and t of "
                f"shape {tuple(t.shape)}: {error}"
            ) from error
        shape = (*x.shape, *out.shape[-1:]) if self.is_matrix else x.shape
        try:
            return out.to(x.dtype).expand(shape)
        except RuntimeError:
            raise ShapeError(
                f"{self} has shape {tuple(out.shape)} for x of shape {tuple(x.shape)} and t of "
                f"shape {tuple(t.shape)}; it must broadcast to {tuple(shape)}"
            ) from None

    def example(self) -> tuple[Tensor, Tensor]:
        """States in several directions, as many as no axis of the state, and a time."""
        n = 10
        while len(x := directions(torch.Size(self.shape), self.like, n)) in self.shape:
            n += 1
        return x, torch.tensor(0.4 * float(self.sde.T), dtype=torch.float64)

    def times(self, n: int) -> Tensor:
        """n irregular times, one in each n-th of (0, T), the first and last near the ends."""
        u = torch.rand(n, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        u[0], u[-1] = 0.02, 0.99
        return (torch.arange(n) + u) / n * float(self.sde.T)

    def over(self, x: Tensor, t: Tensor) -> Tensor:
        """The values at states x (k, *shape) for each time of t (N,), as (N, k, *)."""
        k, n = len(x), len(t)
        rows = max(1, CHUNK // max(1, x.numel()))
        if n > rows:
            return torch.cat([self.over(x, part) for part in t.split(rows)])
        if n > 1 and self.batched:
            many = x.repeat(n, *[1] * len(self.shape))
            return self(many, t.repeat_interleave(k)).unflatten(0, (n, k))
        return torch.stack([self(x, time) for time in t])

    def takes_batches(self) -> bool:
        """Whether times (B,) give each sample what its own time gives it."""
        x, _ = self.example()
        t = self.times(len(x)).flip(0)
        with torch.no_grad():
            alone = torch.cat([self(x[[k, k]], t[k])[:1] for k in range(3)])
            try:
                together = self(x, t)[:3]
            except ShapeError:
                return False
        return torch.allclose(alone, together, rtol=1e-6, atol=0, equal_nan=True)


@dataclass(frozen=True)
class Rate:
    """f(t) or g(t), one number a time or one for each component, read off a term at x = 1.

    kept: () or the shape of the components that differ, broadcasting against the state.
    """

    term: Term
    kept: tuple[int, ...]

    def __repr__(self) -> str:
        return f"Rate({self.term})"

    def __call__(self, t: Tensor) -> Tensor:
        one = self.term.like.new_ones(2, *self.term.shape)
        value = self.term.over(one, t.reshape(-1))[:, 0]
        if self.term.is_matrix:
            value = value.square().sum(-1).sqrt()
        for axis, n in enumerate(self.kept or [1] * len(self.term.shape)):
            value = value.narrow(1 + axis, 0, n)
        return value.reshape((*t.shape, *self.kept)).to(t.dtype)


@dataclass(frozen=True)
class Matrices:
    """F(t), c(t) or G(t) of a coupled system, whose matrices act on axis 1 of the state."""

    term: Term
    part: Literal["F", "c", "G"]
    scale: float = 1.0

    def __repr__(self) -> str:
        return f"Matrices({self.part!r}, {self.term})"

    def __call__(self, t: Tensor) -> Tensor:
        """(*t.shape, d, d), (*t.shape, d) or (*t.shape, d, m)."""
        times, d, rank = t.reshape(-1), self.term.shape[0], len(self.term.shape)
        zero = self.term.like.new_zeros(2, *self.term.shape)
        first = (slice(None),) * 2 + (0,) * (rank - 1)
        if self.part == "G":
            value = self.term.over(zero, times)[:, 0][first]
            if self.term.sde.noise == "elementwise":
                value = torch.diag_embed(value)
            elif self.term.sde.noise == "scalar":
                value = value.unsqueeze(-1)
        else:
            offset = self.term.over(zero, times)[:, 0][first]
            if self.part == "c":
                value = offset
            else:
                units = torch.eye(d).to(zero).reshape(d, d, *[1] * (rank - 1)) * self.scale
                units = units.expand(d, *self.term.shape)
                units = units if d > 1 else units.repeat(2, *[1] * rank)
                made = self.term.over(units, times)[(slice(None),) * 3 + (0,) * (rank - 1)][:, :d]
                value = ((made - offset[:, None]) / self.scale).mT
        return value.reshape((*t.shape, *value.shape[1:])).to(t.dtype)


@dataclass(frozen=True)
class Layout:
    """What the coefficients of a linear SDE look like, over many times.

    kept: the shape of one time's rates, () or broadcasting against the state.
    axis: whether F, c and G act along axis 1 alone; scale: the size at which F is read.
    """

    structure: Structure
    noise: Structure
    offset: bool
    kept: tuple[int, ...]
    axis: bool
    scale: float


@torch.no_grad()
def layout(drift: Term, diffusion: Term, small: bool, n: int = 24) -> Layout:
    """The structure of linear coefficients. small: read them at states of size 1 alone."""
    tolerance = 1e-12 if drift.dtype == torch.float64 else 1e-5
    times, shape = drift.times(n), drift.shape
    rank, d = len(shape), math.prod(shape)
    zero, one = drift.like.new_zeros(2, *shape), drift.like.new_ones(2, *shape)

    c = drift.over(zero, times)[:, 0]
    ones = drift.over(one, times)[:, 0]
    scale = 1.0
    if not small and c.any():  # so far out that the offset does not drown the slope
        slope = float((ones - c).abs().amax()) or float(c.abs().amax())
        scale = 2.0 ** max(0, math.ceil(math.log2(float(c.abs().amax()) / slope)) + 4)
    scale = min(scale, 2.0**40)

    x = scale * directions(torch.Size(shape), one, 8)
    made = drift.over(x, times) - c[:, None]
    diagonal = (drift.over(scale * one, times)[:, :1] - c[:, None]) / scale
    size = made.abs().amax()
    apart = bool(((made - diagonal * x).abs() <= tolerance * size).all())
    if apart and d <= LARGEST:  # couplings too small for random states show on unit vectors
        units = scale * torch.eye(d).to(zero).reshape(d, *shape)
        if d > 1:
            columns = (drift.over(units, times) - c[:, None]).reshape(n, d, d) / scale
            off = columns - torch.diag_embed(columns.diagonal(dim1=1, dim2=2))
            apart = bool((off.abs() <= tolerance * columns.abs().amax()).all())
    offset = bool((c.abs() > tolerance * diagonal.abs().amax()).any())

    g = diffusion.over(one, times)[:, 0]
    if diffusion.is_matrix:
        flat = g.reshape(n, d, -1)
        gram = flat @ flat.mT
        variances = gram.diagonal(dim1=1, dim2=2)
        off = gram - torch.diag_embed(variances)
        alone = bool((off.abs() <= tolerance * variances.abs().amax()).all())
        g = variances.clamp_min(0).sqrt().reshape(n, *shape)
    else:
        alone = diffusion.sde.noise == "elementwise" or d == 1
    structure = _structure(apart, diagonal[:, 0], tolerance)
    noise = _structure(alone, g, tolerance)
    matrices = offset or "matrix" in (structure, noise)
    kept = ()
    if not matrices:  # both on the shape that both need
        sizes = [_kept(rates, tolerance) or (1,) * rank for rates in (diagonal[:, 0], g)]
        kept = tuple(map(max, *sizes)) if max(map(max, sizes)) > 1 else ()
    axis = rank == 1 or not matrices or _along_axis(drift, diffusion, times, scale, tolerance)
    return Layout(structure, noise, offset, kept, axis, scale)


def _structure(apart: bool, rates: Tensor, tolerance: float) -> Structure:
    if not apart:
        return "matrix"
    return "elementwise" if _kept(rates, tolerance) else "scalar"


def _kept(rates: Tensor, tolerance: float) -> tuple[int, ...]:
    """() if all components agree at all times; else their shape, axes on which they do being 1."""
    size = tolerance * rates.abs().amax()
    sizes = []
    for axis, n in enumerate(rates.shape[1:], 1):
        same = (rates - rates.narrow(axis, 0, 1)).abs().amax() <= size
        sizes.append(1 if same else n)
    return tuple(sizes) if max(sizes) > 1 else ()


def _along_axis(
    drift: Term, diffusion: Term, times: Tensor, scale: float, tolerance: float
) -> bool:
    """Whether F acts on axis 1 alone, and c and g are the same along the other axes."""
    if diffusion.sde.noise != "elementwise":
        return False
    zero = drift.like.new_zeros(2, *drift.shape)
    x = scale * directions(torch.Size(drift.shape), zero, 4)
    c, g = drift.over(zero, times)[:, 0], diffusion.over(zero, times)[:, 0]
    F = Matrices(drift, "F", scale)(times).to(x)
    pairs = [(drift.over(x, times) - c[:, None], torch.einsum("nij,kj...->nki...", F, x))]
    pairs += [
        (v, v.flatten(2)[:, :, :1].reshape(*v.shape[:2], *[1] * (v.ndim - 2))) for v in (c, g)
    ]
    return all(bool(((a - b).abs() <= tolerance * a.abs().amax()).all()) for a, b in pairs)
