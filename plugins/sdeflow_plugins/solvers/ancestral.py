"""Ancestral sampling: a deterministic step to a lower noise level, and fresh noise up to the next.

    sigma_up^2 = eta^2 sigma_s^2 (1 - e^{-2h}),   sigma_down^2 = sigma_s^2 - sigma_up^2

The step goes from t to the time where sigma/alpha = sigma_down/alpha_s. With DDIM as the step this
is DDIM itself, at the process's eta; with a second-order one the weak order is 2.
Source: Song et al. (2021, DDIM), eq. 12; Karras et al. (2022, EDM), appendix B.5, for the view.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sdeflow.errors import ArgumentError
from sdeflow.noise import Noise
from sdeflow.plugins import hookimpl
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import SDE
from sdeflow.solver import Memory, StepSolver

from .dpm_solver import DPMSolver
from .dpmpp import DPMpp2S


@dataclass(frozen=True)
class Ancestral(StepSolver):
    """Ancestral sampling with any deterministic one-step solver inside.

    inner: the one-step solver of the deterministic part, `DPMSolver(2)` or `DPMpp2S()` say.
    """

    inner: StepSolver = field(default_factory=lambda: DPMSolver(2))

    needs = ("gaussian", "one alpha")

    def __post_init__(self) -> None:
        check_inner(self.inner)

    @property
    def order(self) -> float | None:  # type: ignore[override]
        """That of the solver inside."""
        return self.inner.order

    @property
    def weak_order(self) -> float:  # type: ignore[override]
        """That of the solver inside, at most 2."""
        return min(2, self.inner.order or 0)

    @property
    def evaluations(self) -> float:  # type: ignore[override]
        """Those of the solver inside."""
        return self.inner.evaluations

    @property
    def point_exact(self) -> bool:  # type: ignore[override]
        """Whether the solver inside is."""
        return self.inner.point_exact

    def check(self, process: SDE) -> None:
        super().check(process)
        assert isinstance(process, ReverseSDE)
        self.inner.check(replace(process, eta=0.0))

    def step(
        self, process: ReverseSDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise, memory: Memory
    ) -> tuple[Tensor, None]:
        sde, flow = process.gaussian, replace(process, eta=0.0)
        if process.deterministic or not bool(sde.sigma(s) > 0):
            return one_step(self.inner, flow, x, t, s, noise), None
        up2 = process.eta**2 * -torch.expm1(sde.log_snr(t) - sde.log_snr(s))
        down = sde.time_of_log_snr(sde.log_snr(s) - torch.log1p(-up2))
        lower = one_step(self.inner, flow, x, t, down, noise)
        (a_d, _), (a_s, s_s) = sde.kernel(x, down), sde.kernel(x, s)
        return (a_s / a_d) * lower + s_s * up2.sqrt() * noise(t, s), None


def check_inner(inner: Any) -> None:
    """Refuse what is not a deterministic solver with a step and an order on ODEs."""
    if not isinstance(inner, StepSolver) or inner.order is None or inner.stochastic:
        raise ArgumentError(
            f"inner={inner!r} must be a one-step solver for ODEs without noise of its own, such as "
            "DPMSolver(2)"
        )


def one_step(
    inner: StepSolver, process: ReverseSDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise
) -> Tensor:
    """x_s by one step of `inner`, begun anew; an error if it is a multistep method."""
    memory = inner.init(process, x, torch.stack((t, s)))
    moved, after = inner.step(process, x, t, s, noise, memory)
    if after is not memory:
        raise ArgumentError(
            f"inner={inner!r} remembers earlier steps, which are not to be had here; use a "
            "one-step solver, such as DPMSolver(2)"
        )
    return moved


@hookimpl
def sdeflow_solvers() -> dict[str, Callable[..., Any]]:
    return {
        "dpm_solver_2_ancestral": Ancestral,
        "dpmpp_2s_ancestral": functools.partial(Ancestral, DPMpp2S()),
    }
