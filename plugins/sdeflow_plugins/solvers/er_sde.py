"""ER-SDE solvers: the reverse SDE with a noise scale phi(rho) of one's own, third order.

    x_s = (alpha_s phi_s)/(alpha_t phi_t) x_t + INT D dw
          + sigma_s sqrt(1 - (phi_s rho_t)^2/(phi_t rho_s)^2) z,
    w = alpha_s phi_s/phi(rho),   rho = sigma/alpha

phi = rho is the probability flow and phi = rho^2 the reverse SDE; every phi = rho psi keeps the
marginals. The process's eta enters as phi = rho psi^(eta^2). D is a polynomial in rho through its
last values, integrated by quadrature: the published code takes its slope at the middle of the last
interval, which costs it an order.
Source: Cui et al. (2024), Elucidating the solution space of extended reverse-time SDE, section 3.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdeflow.errors import ArgumentError, one_of
from sdeflow.noise import Noise
from sdeflow.plugins import hookimpl
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import match
from sdeflow.solver import Memory, StepSolver

from .dpmpp import exponential_euler, third_order
from .ends import check_ends, needs_of, order_of, values_in_use
from .multistep import Value, all_true, polynomial_weights, spread

# fmt: off
SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    # psi = phi/rho, which must not fall                            phi in the authors' code
    "sde": lambda rho: rho,                                       # rho^2, the reverse SDE
    "er_sde_1": lambda rho: torch.exp(-1 / rho) + 10,             # rho (e^(-1/rho) + 10)
    "er_sde_2": lambda rho: rho**0.5,                             # rho^1.5
    "er_sde_3": lambda rho: rho**1.5,                             # rho^2.5
    "er_sde_5": lambda rho: torch.exp(rho**0.3) + 10,             # rho (e^(rho^0.3) + 10)
}  # er_sde_4, rho^0.9 log10(1 + 100 rho^1.5), falls above rho = 1,000 and is left out.
# fmt: on


@dataclass(frozen=True)
class ERSDE(StepSolver):
    """An ER-SDE solver.

    points: values of D in use, 1 to 3. scale: psi by name: "er_sde_5" (the paper's choice) or
        another of its; "sde" is the process itself. On the probability flow they are all the same.
    start, last, reach: see `ends`.
    """

    points: int = 3
    scale: str = "er_sde_5"
    start: str = "grow"
    last: str = "full"
    reach: float = 2.0

    evaluations = 1
    point_exact = True

    def __post_init__(self) -> None:
        if self.points not in (1, 2, 3):
            raise ArgumentError(f"points={self.points!r} must be 1, 2 or 3")
        one_of("scale", self.scale, SCALES)
        check_ends(self.start, self.last, self.reach)

    @property
    def order(self) -> int:  # type: ignore[override]
        """The number of points; at most 2 with last="lower"."""
        return order_of(self.points, self.start, self.last)

    @property
    def weak_order(self) -> int:  # type: ignore[override]
        """At most 2: D along a path of an SDE is not smooth."""
        return min(2, self.points)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return needs_of(self.start, ("gaussian",))

    @property
    def same_paths(self) -> bool:  # type: ignore[override]
        """Whether its noise scale is the process's own."""
        return self.scale == "sde"

    def _phi(self, process: ReverseSDE, rho: Tensor) -> Tensor:
        return rho * SCALES[self.scale](rho) ** process.eta**2

    def init(self, process: ReverseSDE, x: Tensor, ts: Tensor) -> Memory:
        return (), len(ts) - 1

    def step(
        self, process: ReverseSDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        past, left = memory or ((), math.inf)
        sde, data = process.gaussian, process.denoise(x, t)
        (a_t, s_t), (a_s, s_s) = ((sde.alpha(u), sde.sigma(u)) for u in (t, s))
        start, end = s_t / a_t, s_s / a_s
        if not (all_true(start.isfinite()) and all_true(end > 0)):
            mean, std = exponential_euler(process, x, data, t, s)
            moved = mean if process.deterministic else mean + std * noise(t, s)
            return moved, (past, left - 1)
        past = (Value(start, data), *past)[: self.points]
        kept = past[: self.points - 1]
        if self.start == "single" and len(past) < self.points:
            return third_order(process, x, data, t, s), (kept, left - 1)
        behind = past[0].place - past[1].place if len(past) > 1 else None
        points = values_in_use(len(past), left, self.last, self.reach, end - start, behind)
        ratio = self._phi(process, end) / self._phi(process, start)
        total = a_s * (1 - ratio)
        weights = [total]
        if points > 1:
            rho, kernel = self._density(process, start, end)
            kernel = a_s.unsqueeze(-1) * kernel
            weights = polynomial_weights(total, kernel, rho, [v.place for v in past[:points]])
        moved = match(a_s / a_t * ratio, x, s) * x
        for weight, value in zip(weights, past[:points], strict=True):
            moved = moved + match(weight, x, s) * value.value
        if not process.deterministic:
            std = s_s * torch.sqrt((1 - (ratio * start / end) ** 2).clamp_min(0))
            moved = moved + match(std, x, s) * noise(t, s)
        return moved, (kept, left - 1)

    def _density(self, process: ReverseSDE, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """Nodes in rho, spread over its logarithm, and the part of dw/alpha_s at each."""
        nodes, mass = spread(start.log(), end.log())
        with torch.enable_grad():
            rho = nodes.exp().requires_grad_()
            w = self._phi(process, end).unsqueeze(-1) / self._phi(process, rho)
            slope = torch.autograd.grad(w.sum(), rho)[0]
        rho = rho.detach()
        return rho, slope * rho * mass


@hookimpl
def sdeflow_solvers() -> dict[str, Callable[..., Any]]:
    return {f"er_sde_{k}": functools.partial(ERSDE, k) for k in (1, 2, 3)}
