"""The Euler-Maruyama loop in two in-place operations a step, as one would write it by hand.

x.add_(f, alpha=h); x.addcmul_(g, z, value=sqrt|h|), with the times and h read from the grid
beforehand. The buffer is reused only where nobody else, a drift that keeps what it is given, say,
can see it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .errors import ShapeError
from .grid import intervals
from .noise import Noise, SeededNoise
from .sde import SDE

_storage_users: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


def states(process: SDE, x: Tensor, ts: Tensor, noise: Noise) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (t, x_t) after each step, every state a tensor of its own."""
    final: list[Tensor] = []
    for s in _advance(process, x, ts, noise, final, reuse=False):
        yield s, final.pop()


def finish(
    process: SDE, x: Tensor, ts: Tensor, noise: Noise, final: list[Tensor]
) -> Iterator[Tensor]:
    """Yield s after each step; the last state is put into `final`. x itself is left alone."""
    return _advance(process, x, ts, noise, final, reuse=_storage_users is not None)


def _advance(
    process: SDE, x: Tensor, ts: Tensor, noise: Noise, final: list[Tensor], reuse: bool
) -> Iterator[Tensor]:
    """The loop: it puts every new state into `final`; with `reuse`, the last one alone."""
    shape, dtype = x.shape, x.dtype
    drift, diffusion, still = process.drift, process.diffusion, process.deterministic
    calls: list[int] | None = None
    if reuse and hasattr(drift, "bare"):  # every step evaluates once: counted here, all together
        drift, calls = drift.bare
    common = getattr(process.spread, "__func__", None) is SDE.spread
    product = common and process.noise != "matrix" and not still
    # Where z is multiplied here, nobody sees it, and its tensor can be lent.
    lent = noise.borrow() if product and isinstance(noise, SeededNoise) else None
    one_each = (-1, *[1] * (x.ndim - 1)) if process.noise == "scalar" and x.ndim != 2 else None
    references, storage_users = sys.getrefcount, _storage_users or _nobody
    own, storage, cdata = False, None, 0
    f, g, z = (x,) * 3
    constant, version, number = torch.empty(0), 0, 0.0  # the last g that was read as a number
    for t, s, h, root in intervals(ts):
        f = drift(x, t)
        if product:
            g = diffusion(x, t)
            z = noise(t, s) if lent is None else next(lent)
            if one_each is not None:
                z = z.view(one_each)
        elif not still:
            z = process.spread(x, t, noise(t, s))
        try:
            if own and references(x) == _ONE_HOLDER and storage_users(cdata) == 2:
                x.add_(f, alpha=h)
            else:
                if f.__class__ is not Tensor or f.shape != shape or f.dtype is not dtype:
                    f = fitted("drift", f, x)
                x, own = torch.add(x, f, alpha=h), reuse
                storage = x.untyped_storage()
                cdata = storage._cdata
            if still:
                pass
            elif not product:
                x.add_(z, alpha=root)
            elif g is constant and g._version == version:
                x.add_(z, alpha=root * number)
            elif not isinstance(g, Tensor):
                x.add_(fitted("diffusion", g, x) * z, alpha=root)
            elif g.ndim or g.device.type != "cpu":
                x.addcmul_(g, z, value=root)
            else:
                constant, version, number = g, g._version, g.item()
                x.add_(z, alpha=root * number)
        except (RuntimeError, TypeError):
            fitted("drift", f, x)
            fitted("diffusion" if product else "spread", g if product else z, x)
            raise
        if not reuse:
            final.append(x)
        yield s
    if reuse:
        final.append(x)
    if calls is not None:
        calls[0] += len(ts) - 1


def fitted(name: str, value: Any, x: Tensor) -> Tensor:
    """`value`, cast, if it broadcasts to the shape of x; otherwise an error that says so."""
    if isinstance(value, int | float):
        value = torch.tensor(float(value), dtype=x.dtype, device=x.device)
    if not isinstance(value, Tensor):
        raise ShapeError(
            f"{name}(x, t) returned {type(value).__name__}; it must return a tensor of the shape "
            f"of x, {tuple(x.shape)}"
        )
    pairs = zip(reversed(value.shape), reversed(x.shape), strict=False)
    if value.ndim > x.ndim or any(n not in (1, m) for n, m in pairs):
        raise ShapeError(
            f"{name}(x, t) returned shape {tuple(value.shape)} for x of shape {tuple(x.shape)}; "
            "it must be the same, or broadcast to it"
        )
    return value.to(x.dtype)


def _nobody(storage: int) -> int:
    return 0


def _local() -> int:
    x = torch.empty(0)
    return sys.getrefcount(x)


_ONE_HOLDER = _local()
