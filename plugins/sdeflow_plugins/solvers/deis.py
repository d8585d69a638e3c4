"""DEIS: exponential Adams methods on the noise, a polynomial in time or in rho = sigma/alpha.

    x_s/alpha_s = x_t/alpha_t + sum_j eps_j INT l_j drho

Source: Zhang & Chen (2023), Fast sampling with exponential integrator, eq. 15 (tAB), appendix B
(rhoAB). rhoAB with four values is the linear multistep method of k-diffusion (LMS), with exact
integrals.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sdeflow.plugins import hookimpl

from .multistep import Multistep


def deis(degree: int = 2, variable: str = "time", **options: Any) -> Multistep:
    """DEIS-AB of a degree: degree + 1 values of the noise; variable "time" (tAB) or "rho"."""
    return Multistep("noise", variable, degree + 1, **options)


@hookimpl
def sdeflow_solvers() -> dict[str, Callable[..., Any]]:
    named: dict[str, Callable[..., Any]] = {
        f"deis_{name}{degree}": functools.partial(deis, degree, variable)
        for name, variable in (("tab", "time"), ("rhoab", "rho"))
        for degree in (1, 2, 3)
    }
    return named | {"lms": functools.partial(deis, 3, "rho")}
