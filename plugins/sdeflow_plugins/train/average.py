"""Power averages of the weights: how fast they decay, for a width that is a share of the run.

A power average after t steps weighs the weights of step s by p(s) ~ s^gamma on [0, t], so its
width stays a fixed share of the run, however long that gets.
Source: Karras et al. (2024, EDM2), section 3 and appendix C.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from sdeflow.errors import ArgumentError

WIDEST = 0.28
"""The largest relative width; that of a flat average is 0.289."""


def power_decay(width: float, n: int) -> float:
    """beta(t) = (1 - 1/t)^(gamma + 1) of the power average, t = n + 1 its updates with this one.

    After t updates those of step s have the share (s/t)^(gamma + 1) - ((s - 1)/t)^(gamma + 1).
    Source: Karras et al. (2024), eq. 127.
    """
    return (1 - 1 / (n + 1)) ** (exponent(width) + 1)


@cache
def exponent(width: float) -> float:
    """gamma of the profile p(s) ~ s^gamma on [0, t] whose standard deviation is width * t.

    width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
    Source: Karras et al. (2024), eq. 126 and algorithm 2.
    """
    if not 0 < width <= WIDEST:
        raise ArgumentError(f"width={width!r} of a power average must be in (0, {WIDEST}]")
    tail = width**-2
    return float(np.roots([1, 7, 16 - tail, 12 - tail]).real.max())
