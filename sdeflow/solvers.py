"""Generic solvers: they read drift and diffusion alone, and so run any process."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .noise import Noise
from .sde import SDE
from .solver import Memory, StepSolver


@dataclass(frozen=True)
class EulerMaruyama(StepSolver):
    """The Euler-Maruyama method; Euler's on an ODE.

    x_s = x + f(x, t) h + G(x, t) sqrt(|h|) z,   h = s - t

    Strong order 1/2 (1 for additive noise), weak order 1. Source: Maruyama (1955).
    """

    order = 1
    weak_order = 1
    evaluations = 1

    def step(
        self, process: SDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise, memory: Memory
    ) -> tuple[Tensor, None]:
        h = s - t
        moved = x + h * process.drift(x, t)
        if process.deterministic:
            return moved, None
        return moved + h.abs().sqrt() * process.spread(x, t, noise(t, s)), None


@dataclass(frozen=True)
class Heun(StepSolver):
    """Heun's method, the trapezoid rule with an Euler predictor; stochastic on additive noise.

    u = x + f(x, t) h + G dw,   x_s = x + (f(x, t) + f(u, s)) h/2 + G dw,   G at (t + s)/2
    Order 2 on ODEs, weak order 2 on additive noise; noise that depends on the state is refused,
    because there the scheme is no better than Euler-Maruyama at twice the cost.
    Source: Kloeden & Platen (1992), sections 8.1 and 15.1; Karras et al. (2022, EDM) for its use.
    """

    order = 2
    weak_order = 2
    evaluations = 2
    needs = ("additive",)

    def step(
        self, process: SDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise, memory: Memory
    ) -> tuple[Tensor, None]:
        h = s - t
        first = process.drift(x, t)
        if process.deterministic:
            return x + (h / 2) * (first + process.drift(x + h * first, s)), None
        kick = h.abs().sqrt() * process.spread(x, (t + s) / 2, noise(t, s))
        second = process.drift(x + h * first + kick, s)
        return x + (h / 2) * (first + second) + kick, None
