"""UniPC: a predictor and a corrector that costs no evaluation.

The published B(h) cancels from the weights for every order that is solved for. Where the published
code sets a weight to 1/2 by hand (its predictor of order 2, its corrector of order 1) it does not:
with B = e^h - 1 ("bh2") that is the line's value at the middle of the step, taken here as well
(line="middle"); it damps large steps. `unipc_v_p` is the same on v, a polynomial in the angle
atan(sigma/alpha): nothing is singular at either end, and a step to sigma = 0 keeps its order.
Source: Zhao et al. (2023), UniPC, algorithms 1 and 2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sdeflow.plugins import hookimpl

from .multistep import Multistep


def unipc(
    points: int = 2, prediction: str = "data", line: str = "middle", **options: Any
) -> Multistep:
    """UniPC-p: p values predict, p + 1 correct; order p + 1 on the probability flow.

    prediction: of D, in log-SNR, or of "v", in the angle. line: "middle", as published, or "exact".
    """
    variable = "angle" if prediction == "v" else "log_snr"
    return Multistep(prediction, variable, points, corrector=points + 1, line=line, **options)


@hookimpl
def sdeflow_solvers() -> dict[str, Callable[..., Any]]:
    data: dict[str, Callable[..., Any]] = {
        f"unipc_{p}": functools.partial(unipc, p) for p in (1, 2, 3)
    }
    return data | {f"unipc_v_{p}": functools.partial(unipc, p, "v") for p in (2, 3)}
