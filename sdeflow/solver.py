"""`Solver` and `StepSolver`: what carries a state along a grid, and what it asks of a process.

A solver is a frozen dataclass, a value: what a multistep method remembers is handed in and out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from .errors import PairingError
from .noise import Noise
from .reverse import ReverseSDE
from .sde import SDE, GaussianSDE

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
        "use EulerMaruyama(), or Heun() or TorchDiffEq() on its probability_flow",
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
    "noise": Need(
        lambda p: not p.deterministic,
        "is deterministic",
        "use reverse(sde, score), or an ODE solver such as Heun()",
    ),
}


class Solver(ABC):
    """A method that carries a state along a grid of times.

    A subclass declares, as class attributes or properties:
    order: its order on the probability flow; None if it runs on no ODE.
    weak_order: its weak order on SDEs; None if it runs on none.
    evaluations: of the score (or drift) a step; NaN where it varies.
    adaptive: whether it chooses its own steps between the times of the grid.
    needs: names from NEEDS that the process must meet.
    """

    order: float | None = None
    weak_order: float | None = None
    evaluations: float = 1
    adaptive: bool = False
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

    @abstractmethod
    def solve(
        self, process: SDE, x: Tensor, ts: Tensor, noise: Noise
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (t, x_t) for ts[1], ts[2], ..., starting from x at ts[0]."""


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
        for t, s in zip(ts[:-1], ts[1:], strict=True):
            x, memory = self.step(process, x, t, s, noise, memory)
            yield s, x


def _kind(process: SDE) -> str:
    if isinstance(process, ReverseSDE):
        name = type(process.forward).__name__
        return f"process (eta = {process.eta:g}, forward {name})"
    return f"forward SDE {type(process).__name__}"
