"""The integrators of torchdiffeq and torchsde as solvers. Both are imported when first used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import (
    ArgumentError,
    GridError,
    NonFiniteError,
    PairingError,
    SolverError,
    one_of,
    positive_int,
)
from .noise import Noise
from .sde import SDE
from .solver import Solver

NAN = float("nan")
ODE_METHODS: dict[str, tuple[int, float | None]] = {
    # method: (order, evaluations a step; NaN: it varies; None: adaptive)
    "euler": (1, 1),
    "midpoint": (2, 2),
    "heun2": (2, 2),
    "heun3": (3, 3),
    "rk4": (4, 4),
    "explicit_adams": (4, 1),
    "implicit_adams": (5, NAN),
    "fehlberg2": (2, None),
    "adaptive_heun": (2, None),
    "bosh3": (3, None),
    "dopri5": (5, None),
    "dopri8": (8, None),
}


@dataclass(frozen=True)
class TorchDiffEq(Solver):
    """An ODE method of torchdiffeq on a deterministic process.

    method: fixed-step ones (euler, midpoint, heun2, heun3, rk4, explicit_adams, implicit_adams)
        take the grid's steps; adaptive ones (dopri5, dopri8, bosh3, fehlberg2, adaptive_heun)
        choose their own, and the grid says where to report.
    rtol, atol: tolerances of the adaptive ones, on the worst sample of the batch.
    max_evaluations: the bound at which an adaptive method gives up with a SolverError.
    The state is integrated in float32 at least; no adaptive step is made beyond the last time.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    max_evaluations: int = 20_000

    needs = ("ode",)

    def __post_init__(self) -> None:
        one_of("method", self.method, ODE_METHODS)
        positive_int("max_evaluations", self.max_evaluations)
        for name in ("rtol", "atol"):
            if not 0 < getattr(self, name) < 1:
                raise ArgumentError(
                    f"{name}={getattr(self, name)!r} must be in (0, 1), such as 1e-5"
                )

    @property
    def order(self) -> int:  # type: ignore[override]
        """The order of the method."""
        return ODE_METHODS[self.method][0]

    @property
    def evaluations(self) -> float:  # type: ignore[override]
        """Evaluations a step; NaN for adaptive methods."""
        count = ODE_METHODS[self.method][1]
        return NAN if count is None else count

    @property
    def adaptive(self) -> bool:  # type: ignore[override]
        """Whether rtol and atol rule the steps."""
        return ODE_METHODS[self.method][1] is None

    def solve(
        self, process: SDE, x: Tensor, ts: Tensor, noise: Noise
    ) -> Iterator[tuple[Tensor, Tensor]]:
        from torchdiffeq import odeint

        if x.numel() == 0:
            yield from ((t, x) for t in ts[1:])
            return
        if "adams" in self.method:
            _require_equal_steps(self.method, ts)
        wide = torch.promote_types(x.dtype, torch.float32)
        first, last = sorted((float(ts[0]), float(ts[-1])))
        calls = 0

        def slope(t: Tensor, y: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if self.adaptive and calls > self.max_evaluations:
                raise SolverError(
                    f"{self.method} made max_evaluations={self.max_evaluations} evaluations and "
                    f"is at t={float(t):.6g}; loosen rtol={self.rtol} and atol={self.atol}, or end "
                    "the grid at a larger t_min"
                )
            # Stages may fall a rounding error outside the span.
            time = t.detach().to(device="cpu", dtype=torch.float64).clamp(first, last)
            v = process.drift(y.to(x.dtype), time).to(y.dtype)
            if self.adaptive and not v.isfinite().all():
                raise NonFiniteError(
                    f"the drift is not finite at t={float(time):.6g} (evaluation {calls}); check "
                    "the score there, or the ends of the grid"
                )
            return v

        options: dict[str, Any] = {}
        if self.adaptive:
            options = {"norm": _worst_sample, "step_t": ts[-1:].to(x.device)}
        try:
            path = odeint(
                slope,
                x.to(wide),
                ts.to(x.device),
                rtol=self.rtol,
                atol=self.atol,
                method=self.method,
                options=options,
            )
        except AssertionError as error:  # torchdiffeq's way to say that the step size vanished
            if "underflow in dt" not in str(error):
                raise
            raise SolverError(
                f"{self.method} needs steps below rounding after {calls} evaluations: the solution "
                f"runs off, or jumps; loosen rtol={self.rtol} and atol={self.atol}, or end the "
                "grid before that time"
            ) from error
        for t, state in zip(ts[1:], path[1:], strict=True):
            yield t, state.to(x.dtype)


def _require_equal_steps(method: str, ts: Tensor) -> None:
    steps = ts.diff()
    if (steps - steps[0]).abs().max() > 1e-6 * steps[0].abs():
        raise GridError(
            f"ts: torchdiffeq's {method} has coefficients for equal steps only, and these run "
            f"from {float(steps.abs().min()):.3g} to {float(steps.abs().max()):.3g}; use the grid "
            "'uniform', or rk4"
        )


def _worst_sample(y: Tensor) -> Tensor:
    """The largest root mean square over the samples: none hides behind the rest of its batch."""
    return y.reshape(y.shape[0], -1).square().mean(1).sqrt().max() if y.ndim else y.abs()


SDE_METHODS: dict[str, tuple[str, float]] = {
    # method: (the calculus it converges in, weak order on additive noise)
    "euler": ("ito", 1),
    "milstein": ("ito", 1),
    "srk": ("ito", 2),
    "euler_heun": ("stratonovich", 1),
    "heun": ("stratonovich", 2),
    "midpoint": ("stratonovich", 2),
    "log_ode": ("stratonovich", 2),
    "reversible_heun": ("stratonovich", 2),
}


@dataclass(frozen=True)
class TorchSDE(Solver):
    """A method of torchsde, on any grid, state of any rank, forward or in reverse.

    method: euler, milstein, srk (Ito); euler_heun, heun, midpoint, log_ode, reversible_heun
        (Stratonovich: additive noise only, where the two calculi agree).
    Each step is torchsde's own, made on a unit interval u in [0, 1] with t = t_k + u h,
    f~ = f h and g~ = g sqrt(|h|); the increments are ours. torchsde's driver, which knows only
    increasing times and one step size, is not used, nor its Brownian tree.
    """

    method: str = "euler"

    needs = ("noise",)

    def __post_init__(self) -> None:
        one_of("method", self.method, SDE_METHODS)

    @property
    def weak_order(self) -> float:  # type: ignore[override]
        """The weak order on additive noise."""
        return SDE_METHODS[self.method][1]

    @property
    def evaluations(self) -> float:  # type: ignore[override]
        """Evaluations of the drift a step, on additive noise."""
        return {"euler": 1, "milstein": 1, "euler_heun": 1, "reversible_heun": 1}.get(
            self.method, 2
        )

    def check(self, process: SDE) -> None:
        super().check(process)
        calculus = SDE_METHODS[self.method][0]
        if calculus == "stratonovich" and not process.additive:
            raise PairingError(
                f"torchsde's {self.method} converges to the Stratonovich solution; this process is "
                "Ito with noise that may depend on the state: use TorchSDE('euler'), 'milstein' or "
                "'srk'"
            )
        if process.noise == "matrix" and self.method in ("milstein", "srk"):
            raise PairingError(
                f"torchsde's {self.method} takes elementwise noise; for matrix noise use "
                "TorchSDE('euler')"
            )

    def solve(
        self, process: SDE, x: Tensor, ts: Tensor, noise: Noise
    ) -> Iterator[tuple[Tensor, Tensor]]:
        from ._torchsde import UnitInterval

        clock = UnitInterval(process, x, noise, self.method, SDE_METHODS[self.method][0])
        for t, s in zip(ts[:-1], ts[1:], strict=True):
            x = clock.step(x, t, s)
            yield s, x
