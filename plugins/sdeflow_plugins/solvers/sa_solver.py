"""SA-Solver: stochastic Adams, a predictor and a corrector on D, with noise in a band of levels.

eta is the process's; the band says between which sigma/alpha it acts: noise helps in the middle and
harms at both ends. On the probability flow this is a predictor-corrector of order p + 1.
Source: Xue et al. (2023), SA-Solver, eq. 11 to 17 and appendix E (the bands).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from sdeflow.plugins import hookimpl

from .multistep import Multistep


def sa_solver(
    predictor: int = 3,
    corrector: int = 4,
    band: tuple[float, float] = (0.0, math.inf),
    **options: Any,
) -> Multistep:
    """SA-Solver: a predictor and a corrector on D, with noise in a band of levels.

    predictor, corrector: values of D that they use, the new one among the corrector's. band: levels
    of sigma/alpha; the paper's for CIFAR-10 is (0.05, 1), for ImageNet-64 (0.05, 50).
    """
    return Multistep("data", "log_snr", predictor, corrector, band=band, **options)


@hookimpl
def sdeflow_solvers() -> dict[str, Callable[..., Any]]:
    return {"sa_solver": sa_solver}
