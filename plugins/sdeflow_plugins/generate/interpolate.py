"""From one sample to another along the sphere of their noise, by the probability flow.

Normals of d components lie near the sphere of radius sqrt(d), and so do the points of an arc
between two of them, where those of the straight line do not. The flow makes of each a sample.
Source: Song et al. (2021, DDIM), section 5.3; Shoemake (1985), the arc.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdeflow.errors import PairingError, ShapeError
from sdeflow.noise import start
from sdeflow.plugins import get
from sdeflow.reverse import ReverseSDE
from sdeflow.sample import Solution, encode, integrate, make_grid
from sdeflow.solver import Solver

Grid = str | Callable[..., Tensor] | Tensor


def slerp(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    """(sin((1 - u) phi) a + sin(u phi) b)/sin(phi), phi the angle between a and b, by sample.

    a, b: (B, *). u: (B,) in [0, 1]. Where the two are nearly parallel it is the straight line.
    """
    if a.shape != b.shape or u.shape != a.shape[:1]:
        raise ShapeError(
            f"a, b and u have shapes {tuple(a.shape)}, {tuple(b.shape)} and {tuple(u.shape)}; they "
            "must be (B, *), (B, *) and (B,)"
        )
    flat_a, flat_b = (v.flatten(1).double() for v in (a, b))
    cosine = torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=1).clamp(-1, 1)
    phi, u = cosine.arccos(), u.double()
    parallel = phi.sin() < 1e-6
    sine = torch.where(parallel, 1.0, phi.sin())
    first = torch.where(parallel, 1 - u, ((1 - u) * phi).sin() / sine)
    second = torch.where(parallel, u, (u * phi).sin() / sine)
    return (first[:, None] * flat_a + second[:, None] * flat_b).reshape(a.shape).to(a.dtype)


def between_seeds(
    process: ReverseSDE,
    seeds: tuple[int, int],
    u: Tensor,
    shape: tuple[int, ...],
    *,
    solver: Solver | str = "dpmpp_2m",
    steps: int = 20,
    grid: Grid = "log_snr",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    keep: bool = False,
    progress: bool = False,
) -> Solution:
    """Samples on the way from that of one seed, u = 0, to that of another, u = 1.

    process: probability_flow(sde, score). u: (B,). shape: of one sample. The ends are what `sample`
    makes of these seeds.
    """
    _check(process, solver)
    ts = make_grid(process, grid, steps)
    one = (1, *shape)
    a, b = (start(seed, one, dtype, torch.device(device)) for seed in seeds)
    z = slerp(a.expand(len(u), *shape), b.expand(len(u), *shape), u.to(a.device))
    x = process.gaussian.prior(z, ts[0])
    return integrate(process, x, ts, solver, seed=0, keep=keep, progress=progress)


def between_states(
    process: ReverseSDE,
    ends: tuple[Tensor, Tensor],
    u: Tensor,
    *,
    solver: Solver | str = "dpmpp_2m",
    steps: int = 50,
    grid: Grid = "log_snr",
    keep: bool = False,
    progress: bool = False,
) -> Solution:
    """States on the way between two given ones, each (*): both are encoded, and the arc decoded.

    process: probability_flow(sde, score). u: (B,). The grid must end at a time > 0; the ends are
    met up to the error of the solver. `nfe` counts the way there and back.
    """
    _check(process, solver)
    settings: dict[str, Any] = dict(solver=solver, steps=steps, grid=grid)
    there = [encode(process, end.expand(len(u), *end.shape), **settings) for end in ends]
    x = slerp(there[0].x, there[1].x, u.to(there[0].x.device))
    ts = make_grid(process, grid, steps)
    back = integrate(process, x, ts, solver, seed=0, keep=keep, progress=progress)
    nfe = back.nfe + sum(way.nfe for way in there)
    return Solution(back.x, back.ts, nfe, None, back.fused, back.path)


def _check(process: ReverseSDE, solver: Solver | str) -> None:
    made: Solver = get("solver", solver) if isinstance(solver, str) else solver
    if not isinstance(process, ReverseSDE) or not process.deterministic or made.stochastic:
        raise PairingError(
            "interpolation runs the probability flow, which makes one state of one noise: use a "
            "solver that adds none of its own, such as dpmpp_2m, with eta = 0"
        )
