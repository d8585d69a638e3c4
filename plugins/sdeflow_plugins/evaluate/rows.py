"""The rows of a comparison by name: a solver, `solver/grid`, or a preset."""

from __future__ import annotations

from collections.abc import Sequence

from sdeflow.errors import ArgumentError, UnknownNameError
from sdeflow.plugins import get, plugins

from ..generate.sampler import Sampler


def preset_sampler(name: str) -> tuple[Sampler, int]:
    """(sampler, steps) of a preset."""
    found = get("preset", name)
    options, grid_options = dict(found.solver_options), dict(found.grid_options)
    return Sampler(found.solver, options, found.eta, found.grid, grid_options), found.steps


def named_samplers(names: Sequence[str]) -> tuple[dict[str, Sampler], dict[str, int]]:
    """(samplers, the steps of those that have their own), by the names they were given.

    "unipc_2" runs on the default grid of `Sampler`, "unipc_2/angle" on the grid `angle`, and
    "edm_heun_18", a preset, with its own grid, eta and number of steps.
    """
    samplers: dict[str, Sampler] = {}
    fixed: dict[str, int] = {}
    presets = plugins().catalogue("preset")
    for name in names:
        solver, _, grid = name.partition("/")
        if name in presets:
            sampler, fixed[name] = preset_sampler(name)
        else:
            sampler = Sampler(solver, grid=grid) if grid else Sampler(solver)
        try:
            sampler.make_solver()
            sampler.make_grid()
        except UnknownNameError as error:
            raise ArgumentError(
                f"solvers: {name!r} is neither a preset nor a solver or solver/grid: {error}"
            ) from error
        samplers[name] = sampler
    if not samplers:
        raise ArgumentError("solvers=[] is empty; give names such as '[ddim, unipc_2/angle]'")
    return samplers, fixed
