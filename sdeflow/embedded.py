"""Steps that know their error: what `Adaptive` steps by, one method for each kind of process.

Each takes every sample from a time t to a time s of its own, (B,), along w = W_s - W_t and the
space-time area H, given the drift at (x, t), and compares the end with that of a lower order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .sde import SDE, match


class Trial(NamedTuple):
    """One step of every sample, tried."""

    x: Tensor
    error: Tensor
    first: Tensor
    last: Tensor | None = None
    """The drift at the beginning and, where the method knows it, at the end."""


def bogacki_shampine(
    process: SDE, x: Tensor, t: Tensor, s: Tensor, w: Tensor, area: Tensor, first: Tensor
) -> Trial:
    """A step of order 3 on an ODE, with the error of one of order 2; 3 evaluations.

    Source: Bogacki & Shampine (1989).
    """
    h = match(s - t, x, t)
    k2 = process.drift(x + h / 2 * first, t + (s - t) / 2)
    k3 = process.drift(x + 3 * h / 4 * k2, t + 3 * (s - t) / 4)
    end = x + h * (2 * first + 3 * k2 + 4 * k3) / 9
    last = process.drift(end, s)
    return Trial(end, h * (-5 * first + 6 * k2 + 8 * k3 - 9 * last) / 72, first, last)


def sra1(
    process: SDE, x: Tensor, t: Tensor, s: Tensor, w: Tensor, area: Tensor, first: Tensor
) -> Trial:
    """A step of strong order 3/2 on additive noise, with the error of Euler's; 2 evaluations.

        u = x + 3/4 f h + 3/2 G_t (dw/2 + H),
        x_s = x + (f + 2 f(u, t + 3/4 h)) h/3 + G_t (dw/2 + H) + G_s (dw/2 - H)

    H the space-time area; the noise is exact for G linear in t. Source: Rossler (2010), SRA1.
    """
    h = match(s - t, x, t)
    begin = process.spread(x, t, w / 2 + area)
    later = process.spread(x, s, w / 2 + area) - begin
    second = process.drift(x + 0.75 * h * first + 1.5 * begin, t + 0.75 * (s - t))
    bend = 2 / 3 * h * (second - first)
    return Trial(
        x + h * first + bend + begin + process.spread(x, s, w / 2 - area), bend + later, first
    )


def heun(
    process: SDE, x: Tensor, t: Tensor, s: Tensor, w: Tensor, area: Tensor, first: Tensor
) -> Trial:
    """Heun's step on a Stratonovich SDE, with the error of Euler's; 2 evaluations.

    Strong order 1 where the noise commutes, else 1/2. Source: Rumelin (1982).
    """
    h = match(s - t, x, t)
    begin = process.spread(x, t, w)
    u = x + h * first + begin
    bend = (h * (process.drift(u, s) - first) + (process.spread(u, s, w) - begin)) / 2
    return Trial(u + bend, bend, first)


class Method(NamedTuple):
    """A way to step, and how it is steered."""

    step: Callable[..., Trial]
    q: float
    """The error goes as h^q."""
    stages: int
    """Evaluations beside the first drift."""
    aim: float
    """The error aimed at, in units of the tolerance."""
    weight: float
    """That of the last error in the mean that steps go by."""


METHODS = {
    # the process            its method        q stages aim weight
    "deterministic": Method(bogacki_shampine, 3.0, 3, 0.5, 1.0),
    "additive": Method(sra1, 1.5, 1, 0.25, 0.2),
    "general": Method(heun, 1.0, 1, 0.25, 0.2),
}
"""The error of noise is mostly its luck: steps that followed the last one alone would cost twice
the evaluations, measured on geometric Brownian motion at equal error."""
