"""`Solver` and `StepSolver`: what carries a state along a grid, and what it asks of a process.

A solver is a frozen dataclass, a value: what a multistep method remembers is handed in and out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import PairingError
from .grid import intervals
from .noise import Noise
from .reverse import ReverseSDE
from .sde import SDE, GaussianSDE
from .system import LinearSystem

Memory = Any


class Need(NamedTuple):
    """One thing that a solver may ask of a process."""

    met: Callable[[SDE], bool]
    lacking: str
    remedy: str


NEEDS: dict[str, Need] = {
    "reverse": Need(
        lambda p: isinstance(p, ReverseSDE),
        "is no reverse process",
        "wrap it: reverse(sde, score) or probability_flow(sde, score)",
    ),
    "gaussian": Need(
        lambda p: isinstance(p, ReverseSDE) and isinstance(p.forward, GaussianSDE),
        "does not reverse a GaussianSDE (one with alpha and sigma)",
        "use EulerMaruyama(), or Heun() or TorchDiffEq() on its probability_flow; GDDIM() for a "
        "LinearSystem",
    ),
    "system": Need(
        lambda p: isinstance(p, ReverseSDE) and isinstance(p.forward, LinearSystem),
        "does not reverse a LinearSystem (one with matrices F and G)",
        "use DDIM() or DPMpp2M() for a GaussianSDE, EulerMaruyama() for any other",
    ),
    "one alpha": Need(
        lambda p: (
            not isinstance(p, ReverseSDE)
            or not isinstance(p.forward, GaussianSDE)
            or not p.forward.alpha(torch.tensor(p.T, dtype=torch.float64)).ndim
        ),
        "has elementwise schedules, and this solver needs one alpha for all components",
        "use DPMpp2M() or DDIM()",
    ),
    "ode": Need(
        lambda p: p.deterministic,
        "is not deterministic",
        "use probability_flow(sde, score), or a solver for SDEs such as EulerMaruyama()",
    ),
    "eta=1": Need(
        lambda p: isinstance(p, ReverseSDE) and p.eta == 1,
        "does not have eta = 1",
        "use reverse(sde, score), or a solver for every eta such as DDIM()",
    ),
    "additive": Need(
        lambda p: p.additive or p.deterministic,
        "has noise that may depend on the state",
        "use EulerMaruyama(); if g does not depend on x, declare `additive = True` on the SDE",
    ),
    "commutative": Need(
        lambda p: commutes(p),
        "has matrix noise that is not known to commute",
        "use EulerMaruyama() or EulerHeun(); if (dg_k) g_l = (dg_l) g_k for all columns of G, "
        "declare `commutative = True` on the SDE",
    ),
    "diagonal": Need(
        lambda p: p.additive or p.deterministic or p.noise != "matrix",
        "has matrix noise that may depend on the state",
        "use Milstein() where it commutes, EulerHeun() or EulerMaruyama(); if G does not depend on "
        "x, declare `additive = True` on the SDE",
    ),
    "noise": Need(
        lambda p: not p.deterministic,
        "is deterministic",
        "use reverse(sde, score), or an ODE solver such as Heun()",
    ),
}


def commutes(process: SDE) -> bool:
    """Whether the noise is known to commute: all but matrix noise does, unless declared."""
    return (
        process.additive
        or process.deterministic
        or process.commutative
        or process.noise != "matrix"
    )


class Solver(ABC):
    """A method that carries a state along a grid of times.

    A subclass declares, as class attributes or properties:
    order: its order on the probability flow; None if it runs on no ODE.
    weak_order: its weak order on additive noise; None if it runs on no SDE.
    strong_order: its strong order on noise that commutes, such as elementwise; None where unknown.
        On additive noise it may be more, on other noise less: see `strong_order_on`.
    evaluations: of the score (or drift) a step; NaN where it varies.
    adaptive: whether it chooses its own steps between the times of the grid.
    stochastic: whether it adds noise of its own, on a deterministic process too.
    point_exact: whether it keeps the law of one-point data without error, on any grid.
    same_paths: whether its samples have the joint law of the process at all times, and not the
        marginals alone.
    calculus: the sense, "ito" or "stratonovich", in which it reads drifts; the driver converts.
    needs: names from NEEDS that the process must meet.
    """

    order: float | None = None
    weak_order: float | None = None
    strong_order: float | None = None
    evaluations: float = 1
    adaptive: bool = False
    stochastic: bool = False
    point_exact: bool = False
    same_paths: bool = True
    calculus: str = "ito"
    needs: tuple[str, ...] = ()

    def check(self, process: SDE) -> None:
        """Raise a PairingError if this solver cannot integrate the process."""
        name = type(self).__name__
        if not isinstance(process, SDE):
            raise PairingError(
                f"process={process!r} must be an SDE: reverse(sde, score), "
                "probability_flow(sde, score), or a forward SDE"
            )
        for need in self.needs:
            met, lacking, remedy = NEEDS[need]
            if not met(process):
                raise PairingError(
                    f"{name} cannot integrate this {_kind(process)}: it {lacking}; {remedy}"
                )

    def strong_order_on(self, process: SDE) -> float | None:
        """The strong order on the noise of this process: at most 1/2 where it does not commute,
        which is all that increments of the noise can give (Clark & Cameron, 1980)."""
        if self.strong_order is None or commutes(process):
            return self.strong_order
        return min(0.5, self.strong_order)

    @abstractmethod
    def solve(
        self, process: SDE, x: Tensor, ts: Tensor, noise: Noise
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (t, x_t) for ts[1], ts[2], ..., starting from x at ts[0]."""

    def finish(
        self, process: SDE, x: Tensor, ts: Tensor, noise: Noise, final: list[Tensor]
    ) -> Iterator[Tensor]:
        """Yield t after steps, and put the last state alone into `final`: override it where
        buffers can be reused."""
        last = x
        for t, state in self.end(process, x, ts, noise):
            last = state
            yield t
        final.append(last)

    def end(
        self, process: SDE, x: Tensor, ts: Tensor, noise: Noise
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `solve`, where only the last state is wanted: those before it may be left out."""
        return self.solve(process, x, ts, noise)


class StepSolver(Solver):
    """A solver that is one `step` from t to s; the loop is everybody's.

    What `step` computes must not write into x: tensors are values here. A step that is linear in
    the state, the evaluations and the noise is traced and run as fused updates, by itself.
    """

    def init(self, process: Any, x: Tensor, ts: Tensor) -> Memory:
        """What the first step gets as memory; None for one-step methods."""
        return None

    @abstractmethod
    def step(
        self, process: Any, x: Tensor, t: Tensor, s: Tensor, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        """(x_s, memory) from x at t. The memory is None, or tensors and numbers in tuples,
        lists and dicts."""

    def solve(
        self, process: SDE, x: Tensor, ts: Tensor, noise: Noise
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The plain loop over the grid."""
        memory = self.init(process, x, ts)
        for t, s, *_ in intervals(ts):
            x, memory = self.step(process, x, t, s, noise, memory)
            yield s, x


def _kind(process: SDE) -> str:
    if isinstance(process, ReverseSDE):
        name = type(process.forward).__name__
        return f"process (eta = {process.eta:g}, forward {name})"
    return f"forward SDE {type(process).__name__}"
