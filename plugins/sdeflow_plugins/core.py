"""The core's own SDEs, grids and generic solvers, offered through the same door as any plugin."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sdeflow import adaptive, backends, grid, nonlinear, processes, runge_kutta, solvers
from sdeflow.plugins import hookimpl


@hookimpl
def sdeflow_sdes() -> dict[str, Callable[..., Any]]:
    return {
        "vp": processes.VP,
        "sub_vp": processes.SubVP,
        "ve": processes.VE,
        "cosine": processes.Cosine,
        "edm": processes.EDM,
        "rectified_flow": processes.RectifiedFlow,
        "ou": processes.OU,
        "matrix_ou": processes.MatrixOU,
        "cld": processes.CLD,
        "brownian_bridge": processes.BrownianBridge,
        "gbm": nonlinear.GBM,
        "cir": nonlinear.CIR,
        "heston": nonlinear.Heston,
        "double_well": nonlinear.DoubleWell,
        "student_t": nonlinear.StudentT,
        "lorenz": nonlinear.Lorenz,
    }


@hookimpl
def sdeflow_grids() -> dict[str, Callable[..., Any]]:
    return dict(grid.GRIDS)


@hookimpl
def sdeflow_solvers() -> dict[str, Callable[..., Any]]:
    named: dict[str, Callable[..., Any]] = {
        "euler_maruyama": solvers.EulerMaruyama,
        "milstein": solvers.Milstein,
        "euler_heun": solvers.EulerHeun,
        "heun": solvers.Heun,
        "srk": runge_kutta.SRK,
        "platen": runge_kutta.Platen,
        "adaptive": adaptive.Adaptive,
        "torchdiffeq": backends.TorchDiffEq,
        "torchsde": backends.TorchSDE,
    }
    for method in backends.ODE_METHODS:
        named[f"torchdiffeq_{method}"] = _preset(backends.TorchDiffEq, "torchdiffeq", method)
    for method in backends.SDE_METHODS:
        named[f"torchsde_{method}"] = _preset(backends.TorchSDE, "torchsde", method)
    return named


def _preset(solver: Callable[..., Any], library: str, method: str) -> Callable[..., Any]:
    build = functools.partial(solver, method=method)
    build.__doc__ = f"The method {method} of {library}."
    return build
