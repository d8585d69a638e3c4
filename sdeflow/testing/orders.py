"""Measured orders: errors at several numbers of steps, and the slope between them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..backends import TorchDiffEq
from ..errors import ArgumentError
from ..grid import log_snr
from ..reverse import ReverseSDE
from ..sample import integrate
from ..sde import GaussianSDE
from ..solver import Solver
from .law import output_law
from .problems import GaussianData, MixtureData

Grid = Callable[[GaussianSDE, int], Tensor]
SLACK = 0.06
"""How far below the declared order p a measured one may be, in units of 1 + p."""


def weak_errors(
    solver: Solver | str,
    sde: GaussianSDE,
    eta: float,
    steps: list[int],
    grid: Grid = log_snr,
    variance: float = 0.4,
) -> list[float]:
    """Relative error of the output variance on N(0, variance) at each number of steps, exactly."""
    data = GaussianData(sde, torch.zeros(1).double(), torch.full((1,), variance).double())
    process = ReverseSDE(sde, data, eta)
    errors = []
    for n in steps:
        ts = grid(sde, n)
        _, made = output_law(process, ts, solver, *data.law(ts[0]))
        errors.append(float(made / data.law(ts[-1])[1] - 1))
    return errors


def strong_errors(
    solver: Solver | str, sde: GaussianSDE, steps: list[int], grid: Grid = log_snr
) -> list[float]:
    """RMS error against a fine reference on the probability flow of a Gaussian mixture."""
    process = ReverseSDE(sde, MixtureData.five(sde), 0.0)
    generator = torch.Generator().manual_seed(0)
    x = sde.prior(torch.randn(64, 2, dtype=torch.float64, generator=generator), grid(sde, 1)[0])
    exact = integrate(process, x, grid(sde, 1), TorchDiffEq("dopri8", 1e-12, 1e-12)).x
    return [
        float((integrate(process, x, grid(sde, n), solver).x - exact).square().mean().sqrt())
        for n in steps
    ]


def order(errors: list[float], steps: list[int]) -> float:
    """The slope of log error against log steps, over the last two."""
    if len(errors) < 2 or len(errors) != len(steps):
        raise ArgumentError(
            f"errors ({len(errors)}) and steps ({len(steps)}) must match, at least two"
        )
    ratio = abs(errors[-2]) / abs(errors[-1])
    return math.log(ratio) / math.log(steps[-1] / steps[-2])


def asymptotic_order(errors: dict[int, float], floor: float) -> float:
    """The order between the finest two numbers of steps whose errors are above rounding.

    errors: by numbers of steps, the finest last. Infinite where fewer than two are above; minus
    infinity where an error is not finite.
    """
    above = [(e, n) for n, e in errors.items() if not e <= floor][-2:]
    if len(above) < 2:
        return math.inf
    found = order([e for e, _ in above], [n for _, n in above])
    return found if math.isfinite(found) else -math.inf
