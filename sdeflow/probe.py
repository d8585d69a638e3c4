"""Probes: evidence that f(x, t) is affine in x, or free of x, and that samples stay apart.

f is scaled along many directions by powers of two, of both signs, from 1e-30 to 1e90: floating
point scales what is linear without rounding, so that a relative deviation of 1e-12 anywhere is a
finding. Sums of directions are tried as well; so are the places where an operation that is not
linear changes its argument's sign, which finds a threshold or a bump of any width. Evidence is not
proof: `degree` proves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .degree import LIKE, LINEAR, LINEAR_IN, PRODUCTS

Field = Callable[[Tensor, Tensor], Tensor]
"""f(x, t): from (n, *shape) and a time () to (n, *)."""

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
"""Relative deviations that rounding explains."""
RUNGS = {torch.float64: (-100, 100, 300), torch.float32: (-40, 40, 60)}
"""The powers of two that directions are scaled by: from, densely to, sparsely to."""


@dataclass(frozen=True)
class Finding:
    """Where a field is not what it should be: at time t and states of size `size`, by `ratio`.

    kind: "scaling" (f(a x) is not a f(x)), "sum" (f(u + v) is not f(u) + f(v)), "finite".
    """

    kind: str
    t: float
    size: float
    ratio: float


def directions(shape: torch.Size, like: Tensor, n: int = 10) -> Tensor:
    """n normal directions, then some special ones: constant, a ramp, alternating, sparse."""
    generator = torch.Generator().manual_seed(20)
    d = math.prod(shape)
    normal = torch.randn(n, d, generator=generator, dtype=torch.float64)
    ramp = torch.linspace(1, 2, d, dtype=torch.float64)
    signs = 1 - 2 * (torch.arange(d) % 2).double()
    few = torch.eye(d, dtype=torch.float64)[:: max(1, d // 3)][:3] if d <= 4096 else normal[:1]
    special = torch.stack((torch.ones(d).double(), ramp, signs * ramp))
    return torch.cat((normal, special, few)).reshape(-1, *shape).to(like)


def not_affine(field: Field, x: Tensor, t: Tensor, exact: bool = True) -> Finding | None:
    """What shows that f(., t) is not affine; None if nothing does.

    x: directions (n, *shape); exact: try each size of the state alone, to the last digits.
    """
    return _scan(field, x, t, exact, constant=False) or _sums(field, x, t, exact)


def not_constant(field: Field, x: Tensor, t: Tensor, exact: bool = True) -> Finding | None:
    """What shows that f(., t) depends on x; None if nothing does."""
    return _scan(field, x, t, exact, constant=True)


def off_the_ladder(field: Field, x: Tensor, t: Tensor, constant: bool) -> Finding | None:
    """A deviation where an operation that is not linear changes the sign of its argument.

    Thresholds, windows and bumps sit there, however far out and however narrow.
    """
    line = _Line(field, x, t, constant)
    near = [[1.0]] + [[1 + d * 10.0**-k] for k in (2, 4, 6, 9, 12) for d in (1, -1)]
    beside = torch.tensor(near, dtype=torch.float64)
    low, high, _ = RUNGS[x.dtype]
    for sign in (1.0, -1.0):
        sizes = [sign * 2.0**k for k in range(low // 2, high // 2, 3)]
        for a in _crossings(lambda a: _arguments(field, a * x[:2], t), sizes):
            if finding := line.at(a * beside):
                return finding
    return None


def switches(field: Field, x: Tensor, times: Tensor) -> Tensor:
    """Times just beside those at which an argument of an operation passes zero."""

    def arguments(t: float) -> Tensor:
        return _arguments(field, x[:2], torch.tensor(t, dtype=torch.float64))

    found = list(_crossings(arguments, times.tolist()))
    return torch.tensor([t * (1 + d) for t in found for d in (-1e-7, 1e-7)], dtype=torch.float64)


def coupled(field: Field, x: Tensor, t: Tensor) -> str:
    """How a sample's value depends on its batch: "" if it does not."""
    tolerance = TOLERANCE[x.dtype]
    alone = field(x, t)

    def differs(a: Tensor, b: Tensor) -> bool:
        size = tolerance * torch.maximum(alone.abs().amax(), a.abs().amax())
        both = a.isfinite() & b.isfinite()
        return bool(((a - b).abs() > size)[both].any())

    # The other samples at sizes of their own: a share of 1e-15 in their mean would show.
    for size in (0.0, 2.0**20, 2.0**60 if x.dtype == torch.float64 else 2.0**30):
        other = torch.cat((x[:1], size * x[1:].roll(1, 0)))
        if differs(alone[:1], field(other, t)[:1]):
            return "on the other samples of the batch"
    if differs(alone[:2], field(x[:2].clone(), t)):
        return "on the size of the batch"
    if differs(alone.flip(0), field(x.flip(0), t)):
        return "on the place of a sample in the batch"
    return ""


class _Line:
    """What a field must return on the rays a x, given its values at 0 and x."""

    def __init__(self, field: Field, x: Tensor, t: Tensor, constant: bool) -> None:
        self.field, self.x, self.t, self.constant = field, x, t, constant
        self.zero, self.base = field(torch.zeros_like(x), t), field(x, t)
        self.scale = self.base.abs().amax(0, keepdim=True)
        self.tolerance = TOLERANCE[x.dtype]

    def at(self, a: Tensor, exact: bool = False) -> Finding | None:
        """A deviation at a x, for a (k, n) or (k, 1): the first large one, or the worst.

        exact: the scaling itself makes no rounding error; then every component is judged alone.
        """
        a = a.to(self.x).expand(len(a), len(self.x))
        x = a.reshape(*a.shape, *[1] * (self.x.ndim - 1)) * self.x
        out = self.field(x.flatten(0, 1), self.t).unflatten(0, a.shape)
        a = a.reshape(*a.shape, *[1] * (out.ndim - 2))
        if self.constant:
            expected, size = self.base, self.base.abs()
        else:
            offset = self.zero
            expected = offset + a * (self.base - offset)
            scale = self.base.abs() if exact else self.scale
            size = a.abs() * (scale + offset.abs()) + offset.abs()
        ratio = (out - expected).abs() / size
        known = (out != expected) & out.isfinite() & expected.isfinite()
        ratio = torch.where(known, ratio, 0.0).nan_to_num(nan=math.inf).flatten(2).amax(2)
        if float(ratio.max()) <= self.tolerance:
            return None
        large = (ratio > 0.05).nonzero()
        k, row = (large[0] if len(large) else (ratio == ratio.max()).nonzero()[0]).tolist()
        return Finding("scaling", float(self.t), float(x[k, row].abs().max()), float(ratio[k, row]))


def _scan(field: Field, x: Tensor, t: Tensor, exact: bool, constant: bool) -> Finding | None:
    line = _Line(field, x, t, constant)
    low, high, top = RUNGS[x.dtype]
    if not bool((line.base.isfinite() & line.zero.isfinite()).all()):
        size = 0.0 if line.base.isfinite().all() else 1.0
        return Finding("finite", float(t), size, math.nan)
    # From the middle outwards, so that what is told is what happens nearest to states of size 1.
    step = 4 if exact else 5
    powers = sorted([*range(low, high, step), *range(high, top + 1, 4 * step)], key=abs)
    sizes = [[sign * 2.0**k] for k in powers for sign in (1, -1)]
    ladder = torch.tensor(sizes, dtype=torch.float64)
    # One by one: how a matrix product rounds depends on the size of the batch.
    findings = [line.at(a, exact) for a in (ladder.split(1) if exact else (ladder,))]
    found = [finding for finding in findings if finding]
    large = next((finding for finding in found if finding.ratio > 0.05), None)
    return large or max(found, key=lambda f: f.ratio, default=None) or _edge(line, top)


def _edge(line: _Line, top: int) -> Finding | None:
    """A deviation on the way to an overflow, if there is one: the last finite values tell."""
    n = len(line.x)

    def finite(exponent: Tensor) -> Tensor:
        a = (2.0**exponent).to(line.x).reshape(n, *[1] * (line.x.ndim - 1))
        return line.field(a * line.x, line.t).isfinite().reshape(n, -1).all(1)

    high = torch.full((n,), float(top), dtype=torch.float64)
    if bool(finite(high).all()):
        return None
    low = torch.zeros(n, dtype=torch.float64)
    for _ in range(40):
        middle = (low + high) / 2
        ok = finite(middle)
        low, high = torch.where(ok, middle, low), torch.where(ok, high, middle)
        if finding := line.at((2.0**low).reshape(1, n)):
            return finding
    return None


def _sums(field: Field, x: Tensor, t: Tensor, exact: bool) -> Finding | None:
    tolerance = 8 * TOLERANCE[x.dtype]
    zero = field(torch.zeros_like(x), t)
    for size in (1.0, 2.0**15, 2.0**-15) if exact else (1.0,):
        for shift in (1, 3) if exact else (2,):
            u, v = size * x, size * x.roll(shift, 0)
            f_u, f_v, both = field(u, t), field(v, t), field(u + v, t)
            scale = f_u.abs().amax(0, keepdim=True) + f_v.abs().amax(0, keepdim=True) + zero.abs()
            gap = (both - f_u - f_v + zero).abs()
            ratio = torch.where(gap > tolerance * scale, gap / scale, 0.0)
            if bool((ratio > 0).any()):
                return Finding("sum", float(t), float(u.abs().max()), float(ratio.max()))
    return None


# ---- where an operation that is not linear changes the sign of its argument


class _Recorder(TorchDispatchMode):
    """Writes down the arguments of operations that are not known to be linear."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__.removesuffix("_")
        if name not in LINEAR and name not in LIKE and name not in LINEAR_IN:
            if name not in PRODUCTS:
                self._note([*args, *kwargs.values()])
        return func(*args, **kwargs)

    def _note(self, values: list[Any]) -> None:
        tensors = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
        numbers = [float(v) for v in values if isinstance(v, int | float) and v is not True]
        for a in tensors[:3]:
            self.seen += [a.detach().clone(), *(a.detach() - c for c in numbers)]
        if len(tensors) > 1:
            self.seen += [(a - tensors[0]).detach() for a in tensors[1:3]]


def _arguments(field: Field, x: Tensor, t: Tensor) -> Tensor:
    with _Recorder() as recorder, torch.no_grad():
        field(x, t)
    flat = [s.reshape(-1) for s in recorder.seen]
    few = [s[:: max(1, len(s) // 5)][:6].double() for s in flat]  # any component will do
    return torch.cat(few) if few else torch.zeros(0, dtype=torch.float64)


def _crossings(
    arguments: Callable[[float], Tensor], points: list[float], most: int = 60
) -> Iterator[float]:
    """Where, between the points, a component of arguments(a) passes zero."""
    low, before, found = points[0], arguments(points[0]), 0
    for high in points[1:]:
        now = arguments(high)
        if now.shape == before.shape:
            for i in (now * before < 0).nonzero().flatten().tolist():
                if found >= most:
                    return
                found += 1
                yield _root(lambda a, i=i: arguments(a)[i], low, high, before[i], now[i])  # type: ignore[misc]
        low, before = high, now


def _root(
    u: Callable[[float], Tensor], low: float, high: float, u_low: Tensor, u_high: Tensor
) -> float:
    """A zero of u between low and high, by the Illinois rule."""
    f_low, f_high, a = float(u_low), float(u_high), low
    for _ in range(30):
        a = high - f_high * (high - low) / (f_high - f_low)
        try:
            f = float(u(a))
        except IndexError:  # another branch, with other operations
            return a
        if f == 0 or abs(high - low) < 1e-14 * abs(a) or f_high == f_low:
            return a
        if f * f_high < 0:
            low, f_low = high, f_high
        else:
            f_low /= 2
        high, f_high = a, f
    return a
