"""How a multistep method begins and ends: the options `start`, `last` and `reach` of all of them.

start: "grow" takes as many values as there are, so that a run that begins far from the noise is of
    order 2; "single" makes the first points - 1 steps with DPM-Solver++ 3S, at two more evaluations
    each, on the probability flow.
last: "full" order in every step; "lower" drops to 2 and 1 in the last two; "auto" drops to 1 where
    a step is more than `reach` times the one before, in the variable of the polynomial. Beyond
    twice, a polynomial through D misses by more than a constant (benchmarks/results/nfe_error.md).

Source: Lu et al. (2022b), appendix, and the `lower_order_final` of the authors' code.
"""

from __future__ import annotations

from torch import Tensor

from sdeflow.errors import ArgumentError, one_of

STARTS = ("grow", "single")
LASTS = ("full", "lower", "auto")


def check_ends(start: str, last: str, reach: float, starts: tuple[str, ...] = STARTS) -> None:
    """Refuse a setting that is none."""
    one_of("start", start, starts)
    one_of("last", last, LASTS)
    if not reach > 0:
        raise ArgumentError(f"reach={reach!r} must be > 0, such as 3")


def order_of(points: int, start: str, last: str) -> int:
    """The order on the probability flow of a method of that order in the middle of a run."""
    best = min(points, 4) if start == "single" else points
    return min(best, 2) if last == "lower" else best


def needs_of(start: str, needs: tuple[str, ...]) -> tuple[str, ...]:
    """What a method needs that needs that much without its start."""
    more = ("ode", "one alpha") if start == "single" else ()
    return (*needs, *(need for need in more if need not in needs))


def values_in_use(
    points: int, left: float, last: str, reach: float, ahead: Tensor, behind: Tensor | None
) -> int:
    """How many of `points` values a step uses, of which `left` remain, itself among them.

    ahead, behind: its length and that of the step before it, in the polynomial's variable.
    """
    if last == "lower":
        return int(min(points, left))
    if last == "auto" and points > 1 and behind is not None:
        return points if bool((ahead.abs() <= reach * behind.abs()).all()) else 1
    return points
