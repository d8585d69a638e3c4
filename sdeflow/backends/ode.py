"""The methods of torchdiffeq as solvers."""

from __future__ import annotations

import bisect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import (
    ArgumentError,
    GridError,
    NonFiniteError,
    PairingError,
    SolverError,
    one_of,
    positive_int,
)
from ..noise import Noise
from ..sde import SDE
from ..solver import Solver
from .parameters import check_parameters, parameters_of

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
    "scipy_solver": (5, None),
}
SCIPY = {"RK23": 3, "RK45": 5, "DOP853": 8, "Radau": 5, "BDF": 5, "LSODA": 5}
"""The methods of scipy.integrate.solve_ivp and their orders (of BDF and LSODA: the highest)."""

Slope = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TorchDiffEq(Solver):
    """An ODE method of torchdiffeq on a deterministic process.

    method: fixed-step ones (euler, midpoint, heun2, heun3, rk4, explicit_adams, implicit_adams)
        take the grid's steps; adaptive ones (dopri5, dopri8, bosh3, fehlberg2, adaptive_heun,
        scipy_solver) choose their own, and the grid says where to report.
    rtol, atol: tolerances of the adaptive ones, on the worst sample of the batch; of
        implicit_adams, at which its iteration stops. (explicit_adams goes back 4 steps here, not
        torchdiffeq's 11, which are unstable at any but the smallest steps.)
    max_evaluations: the bound at which an adaptive method gives up with a SolverError.
    scipy: the method that scipy_solver uses: RK23, RK45, DOP853 or, for stiff problems, Radau, BDF,
        LSODA. It runs on the host, and takes the batch for one system of equations.
    adjoint: how gradients come about (integrate(..., grad=True)): False, by backpropagation
        through the steps; True, by torchdiffeq's odeint_adjoint: the adjoint ODE is run backwards
        from the end, and nothing of the path is kept; with keep=True its states are, and the run
        back begins at each of them anew. The two gradients agree as steps or tolerances shrink.
    parameters: the tensors beside x that want gradients from the adjoint; None finds those that
        the drift looks at, by one evaluation at each end of the grid.
    The state is integrated in float32 at least. The process sees the grid's times as they are,
    those between in the precision of the state, and none outside.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    max_evaluations: int = 20_000
    scipy: str = "LSODA"
    adjoint: bool = False
    parameters: tuple[Tensor, ...] | None = field(default=None, repr=False, compare=False)

    needs = ("ode",)

    def __post_init__(self) -> None:
        one_of("method", self.method, ODE_METHODS)
        one_of("scipy", self.scipy, SCIPY)
        positive_int("max_evaluations", self.max_evaluations)
        check_parameters(self.parameters)
        for name in ("rtol", "atol"):
            if not 0 < getattr(self, name) < 1:
                raise ArgumentError(
                    f"{name}={getattr(self, name)!r} must be in (0, 1), such as 1e-5"
                )

    @property
    def order(self) -> int:  # type: ignore[override]
        """The order of the method."""
        return SCIPY[self.scipy] if self.method == "scipy_solver" else ODE_METHODS[self.method][0]

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
        return self._run(process, x, ts, every=True)

    def end(
        self, process: SDE, x: Tensor, ts: Tensor, noise: Noise
    ) -> Iterator[tuple[Tensor, Tensor]]:
        return self._run(process, x, ts, every=not self.adjoint)

    def _run(
        self, process: SDE, x: Tensor, ts: Tensor, every: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        import torchdiffeq

        if not x.numel():
            yield from ((t, x) for t in ts[1:])
            return
        adjoint = self.adjoint and torch.is_grad_enabled()
        if "adams" in self.method:
            _require_equal_steps(self.method, ts)
        if self.method == "scipy_solver" and torch.is_grad_enabled() and not adjoint:
            if x.requires_grad or parameters_of(process, x, ts):
                raise PairingError(
                    "torchdiffeq's scipy_solver leaves torch, and no gradient flows back through "
                    "its steps: use TorchDiffEq('scipy_solver', adjoint=True), or dopri5"
                )
        wide = torch.promote_types(x.dtype, torch.float32)
        times = ts.to(x.device) if x.device.type != "mps" else ts.to(x.device, torch.float32)
        report = times if every else times[[0, -1]]
        more: dict[str, Any] = {}
        if adjoint:
            given = self.parameters
            more["adjoint_params"] = parameters_of(process, x, ts) if given is None else given
            # Adams' starts are no better than rk4, and backwards each interval may be a start.
            more["adjoint_method"] = "rk4" if "adams" in self.method else self.method
            # torchdiffeq turns a decreasing clock around before it runs, and these it reads then.
            clock = times if times[0] < times[-1] else -times
            more["adjoint_options"] = self._options(clock.flip(0), every, backwards=True)
        slope = _Slope(self, process, x.dtype, ts)
        scale = x.shape[0] ** 0.5 if self.method == "scipy_solver" else 1.0
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "Functional iteration did not converge")
                warnings.filterwarnings("ignore", "The following arguments have no effect")
                path = (torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint)(
                    slope,
                    x.to(wide),
                    report,
                    rtol=self.rtol / scale,
                    atol=self.atol / scale,
                    method=self.method,
                    options=self._options(times, every),
                    **more,
                )
        except (AssertionError, UserWarning) as error:  # torchdiffeq's ways to say so
            raise _explained(self, slope, error) from error
        if len(path) < len(report):
            raise _explained(self, slope, None)
        for t, state in zip(ts[1:] if every else ts[-1:], path[1:], strict=True):
            yield t, state.to(x.dtype)

    def _options(self, times: Tensor, every: bool, backwards: bool = False) -> dict[str, Any]:
        """What torchdiffeq is told beside the tolerances, for a run over the given times."""
        if self.method == "scipy_solver":
            return {"solver": "LSODA" if backwards else self.scipy}  # which alone warns of nothing
        if not self.adaptive:
            fixed: dict[str, Any] = {} if every else {"grid_constructor": lambda f, y, t: times}
            if self.method == "explicit_adams" and not backwards:
                fixed["max_order"] = 5  # steps + 1; its 11 steps blow up from |slope| h = 0.01 on
            return fixed
        # No step beyond the last time, and backwards none beyond the next report.
        options: dict[str, Any] = {"step_t": times[1:] if every and backwards else times[-1:]}
        return options if backwards else {**options, "norm": _worst_sample}


class _Slope:
    """The drift for torchdiffeq: (t, y) -> dy/dt, bounded in number, inside the span, finite."""

    def __init__(self, solver: TorchDiffEq, process: SDE, dtype: torch.dtype, ts: Tensor) -> None:
        self.solver, self.process, self.dtype = solver, process, dtype
        self.nodes = sorted(ts.tolist())
        self.rounding = 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        self.time = float(ts[0])
        self.calls = {False: 0, True: 0}  # in the run, and in an adjoint's way back
        self.careful = solver.adaptive or solver.method == "implicit_adams"

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        solver, back = self.solver, self.solver.adjoint and torch.is_grad_enabled()
        self.calls[back] += 1
        if solver.adaptive and self.calls[back] > solver.max_evaluations:
            raise SolverError(
                f"{solver.method} made max_evaluations={solver.max_evaluations} evaluations and "
                f"is at t={float(t):.6g}; loosen rtol={solver.rtol} and atol={solver.atol}, end "
                "the grid at a larger t_min, or take a method for stiff problems: "
                "TorchDiffEq('scipy_solver', scipy='Radau')"
            )
        time = self._exact(float(t.detach()))
        v = self.process.drift(y.to(self.dtype), time).to(y.dtype)
        if self.careful:
            self.time = float(time)
            if not v.isfinite().all():
                raise NonFiniteError(
                    f"the drift is not finite at t={self.time:.6g} (evaluation "
                    f"{self.calls[back]}); check the score there, or the ends of the grid"
                )
        return v

    def _exact(self, t: float) -> Tensor:
        """The time inside the span, which stages may leave by a rounding error, and that of the
        grid where the library has rounded it to the precision of the state."""
        k = bisect.bisect_left(self.nodes, t)
        for node in self.nodes[max(k - 1, 0) : k + 1]:
            if abs(node - t) <= self.rounding * abs(node):
                return torch.tensor(node, dtype=torch.float64)
        return torch.tensor(t, dtype=torch.float64).clamp(self.nodes[0], self.nodes[-1])


def _explained(solver: TorchDiffEq, slope: _Slope, error: Exception | None) -> Exception:
    """The error of ours for one of the library's."""
    calls, text = slope.calls[False], str(error)
    if "did not converge" in text:
        return SolverError(
            f"implicit_adams: its iteration did not converge at t={slope.time:.6g} (evaluation "
            f"{calls}): the steps are too long for so stiff a problem, or rtol={solver.rtol} and "
            f"atol={solver.atol} too tight; use a finer grid, or "
            "TorchDiffEq('scipy_solver', scipy='Radau')"
        )
    if error is None or "underflow in dt" in text or "non-finite values in state" in text:
        return SolverError(
            f"{solver.method} needs steps below rounding after {calls} evaluations: the solution "
            f"runs off, or jumps; loosen rtol={solver.rtol} and atol={solver.atol}, or end the "
            "grid before that time"
        )
    return error


def _require_equal_steps(method: str, ts: Tensor) -> None:
    steps = ts.diff()
    if (steps - steps[0]).abs().max() > 1e-6 * steps[0].abs():
        raise GridError(
            f"ts: torchdiffeq's {method} has coefficients for equal steps only, and these run "
            f"from {float(steps.abs().min()):.3g} to {float(steps.abs().max()):.3g}; use the grid "
            "'uniform', or rk4"
        )


def _worst_sample(y: Tensor) -> Tensor:
    """The largest root mean square over the samples: none hides behind the rest of its batch.

    A number without a graph: gradients by way of the first step size, which is chosen by it, would
    be those of half a dependence, for the drift is asked at times that have none.
    """
    y = y.detach()
    return y.reshape(y.shape[0], -1).square().mean(1).sqrt().max() if y.ndim else y.abs()
