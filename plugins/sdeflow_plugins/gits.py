"""GITS: a time grid fitted to the curvature of a model's own trajectories.

Source: Chen et al. (2024), On the trajectory regularity of ODE-based diffusion sampling, section 4.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdeflow.errors import ArgumentError, GridError, positive_int
from sdeflow.grid import check_grid, karras
from sdeflow.plugins import hookimpl
from sdeflow.reverse import ReverseSDE
from sdeflow.sample import integrate
from sdeflow.sde import SDE

from .solvers.ddim import DDIM


def fitted(process: ReverseSDE, x: Tensor, fine: Tensor) -> Callable[[SDE, int], Tensor]:
    """A grid fitted to a model: call it as grid(sde, n), for any n below that of `fine`.

    process: a probability flow; x: states at fine[0], a few dozen; fine: a fine grid to choose
    from, which is walked once. The n steps are those of `fine` with the least sum of the errors
    that single DDIM steps make along the fine trajectories, found by dynamic programming.
    """
    fine = check_grid(fine)
    if not isinstance(process, ReverseSDE) or not process.deterministic:
        raise ArgumentError(f"process={process!r} must be a probability_flow(sde, score)")
    cost = _costs(process, x, fine)

    @functools.cache
    def chosen(n: int) -> Tensor:
        best = cost[:, -1]  # from each node to the end, in 1, 2, ... steps
        nexts = []
        for _ in range(n - 1):
            best, node = (cost + best).min(1)
            nexts.append(node)
        nodes = [0]
        for node in reversed(nexts):
            nodes.append(int(node[nodes[-1]]))
        return fine[[*nodes, len(fine) - 1]]

    def build(sde: SDE, n: int) -> Tensor:
        """The fitted grid of n steps."""
        if sde != process.forward:
            raise GridError(f"sde={sde!r}: this grid is fitted to {process.forward!r} alone")
        if positive_int("steps", n) >= len(fine):
            raise GridError(f"steps={n} must be at most {len(fine) - 1}, those of the fine grid")
        return chosen(n).clone()

    return build


@torch.no_grad()
def _costs(process: ReverseSDE, x: Tensor, fine: Tensor) -> Tensor:
    """The mean error of one DDIM step from node i to node j > i of the fine path; else infinite."""
    path = integrate(process, x, fine, DDIM(), keep=True).path
    assert path is not None
    size, sde = len(fine), process.gaussian
    cost = torch.full((size, size), math.inf, dtype=torch.float64)
    for i in range(size - 1):
        data = process.denoise(path[i], fine[i])
        for j in range(i + 1, size):
            mean, _ = sde.posterior(path[i], data, fine[i], fine[j], 0.0)
            cost[i, j] = (mean - path[j]).flatten(1).norm(dim=1).mean()
    return cost


def gits(
    sde: SDE,
    n: int,
    *,
    process: ReverseSDE | None = None,
    x: Tensor | None = None,
    fine: int = 60,
    to_zero: bool = False,
) -> Tensor:
    """The grid fitted to a model: give it process=probability_flow(...), and x, states at T.

    A few dozen states do. The steps are chosen from those of the grid `karras` of `fine` steps;
    `fitted` keeps what was found, for other numbers of steps, and takes any fine grid.
    """
    if process is None or x is None:
        raise GridError(
            "the grid 'gits' is fitted to a model: give process=probability_flow(sde, denoiser) "
            "and x, some states at the time T; or use another grid, such as 'karras'"
        )
    return fitted(process, x, karras(sde, fine, to_zero=to_zero))(sde, n)


@hookimpl
def sdeflow_grids() -> dict[str, Callable[..., Any]]:
    return {"gits": gits}
