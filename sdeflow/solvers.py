"""Generic solvers: they read drift and diffusion alone, and so run any process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import euler
from .calculus import correction
from .derivatives import linearise, one_each, own_slopes
from .errors import PairingError
from .noise import Noise
from .sde import SDE, match
from .solver import Memory, StepSolver


@dataclass(frozen=True)
class EulerMaruyama(StepSolver):
    """The Euler-Maruyama method; Euler's on an ODE.

    x_s = x + f(x, t) h + G(x, t) sqrt(|h|) z,   h = s - t

    Strong order 1/2 (1 for additive noise), weak order 1. Source: Maruyama (1955).
    """

    order = 1
    weak_order = 1
    strong_order = 0.5
    evaluations = 1

    def strong_order_on(self, process: SDE) -> float:
        """1 on additive noise, else 1/2."""
        return 1.0 if process.additive else 0.5

    def step(
        self, process: SDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise, memory: Memory
    ) -> tuple[Tensor, None]:
        h = s - t
        moved = x + h * process.drift(x, t)
        if process.deterministic:
            return moved, None
        return moved + h.abs().sqrt() * process.spread(x, t, noise(t, s)), None

    def solve(
        self, process: SDE, x: Tensor, ts: Tensor, noise: Noise
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The steps in place, on tensors of their own; the plain loop where gradients flow."""
        run = super().solve if torch.is_grad_enabled() else euler.states
        return run(process, x, ts, noise)

    def finish(
        self, process: SDE, x: Tensor, ts: Tensor, noise: Noise, final: list[Tensor]
    ) -> Iterator[Tensor]:
        """The steps in place, in one buffer."""
        run = super().finish if torch.is_grad_enabled() else euler.finish
        return run(process, x, ts, noise, final)


@dataclass(frozen=True)
class Milstein(StepSolver):
    """Milstein's method, Euler-Maruyama with the double integrals of commuting noise; Ito.

        x_s = x + f h + G dw + 1/2 (d(G dw)) G dw - |h| c,   c = 1/2 sum_k (dg_k) g_k

    with d(G dw) the derivative of G(x, t) dw at fixed dw: 1/2 g g' (dw^2 - |h|) for elementwise
    noise whose g_i looks at x_i alone. The derivatives of G are autograd's. Noise that does not
    commute needs the Levy area and is refused: matrix noise that does not declare it, and at the
    start of the run any g that turns out otherwise.
    Strong order 1, weak order 1. Source: Milstein (1974); Kloeden & Platen (1992), section 10.3.
    """

    order = 1
    weak_order = 1
    strong_order = 1
    evaluations = 1
    needs = ("commutative",)

    def init(self, process: SDE, x: Tensor, ts: Tensor) -> None:
        require_commuting(self, process, x, ts[0])

    def step(
        self, process: SDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise, memory: Memory
    ) -> tuple[Tensor, None]:
        h, root = match(s - t, x, t), (s - t).abs().sqrt()
        moved = x + h * process.drift(x, t)
        if process.deterministic:
            return moved, None
        z = noise(t, s)
        dw = match(root, z, t) * z
        if process.additive:
            return moved + process.spread(x, t, dw), None
        c = correction(process, x, t)
        if process.noise != "matrix":
            square = per_state(process, x, z) ** 2
            return moved + process.spread(x, t, dw) + h.abs() * c * (square - 1), None
        kick, along = linearise(lambda y: process.spread(y, t, dw), x, torch.is_grad_enabled())
        twice = torch.zeros_like(x) if along is None else along(kick)
        return moved + kick + twice / 2 - h.abs() * c, None


@dataclass(frozen=True)
class EulerHeun(StepSolver):
    """The Euler-Heun method: Euler's for the drift, the trapezoid rule for the noise; Stratonovich.

        x_s = x + f h + (G(x, t) + G(x + G dw, s)) dw/2

    Strong order 1 where the noise commutes, else 1/2; weak order 1. Source: Kloeden & Platen
    (1992), section 11.1 (derivative-free Milstein); Roberts (2012).
    """

    order = 1
    weak_order = 1
    strong_order = 1
    evaluations = 1
    calculus = "stratonovich"

    def step(
        self, process: SDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise, memory: Memory
    ) -> tuple[Tensor, None]:
        moved = x + match(s - t, x, t) * process.drift(x, t)
        if process.deterministic:
            return moved, None
        z = noise(t, s)
        dw = match((s - t).abs().sqrt(), z, t) * z
        kick = process.spread(x, t, dw)
        return moved + 0.5 * (kick + process.spread(x + kick, s, dw)), None


@dataclass(frozen=True)
class Heun(StepSolver):
    """Heun's method, the trapezoid rule with an Euler predictor; Stratonovich.

        u = x + f(x, t) h + G(x, t) dw,
        x_s = x + (f(x, t) + f(u, s)) h/2 + (G(x, t) + G(u, s)) dw/2;

    additive noise is taken once, at (t + s)/2. Order 2 on ODEs; strong order 1 where the noise
    commutes, else 1/2; weak order 2 on additive noise, else 1.
    Source: Kloeden & Platen (1992), sections 8.1 and 15.1; Rumelin (1982); Karras et al. (2022,
    EDM) for its use.
    """

    order = 2
    weak_order = 2
    strong_order = 1
    evaluations = 2
    calculus = "stratonovich"

    def step(
        self, process: SDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise, memory: Memory
    ) -> tuple[Tensor, None]:
        h = match(s - t, x, t)
        first = process.drift(x, t)
        if process.deterministic:
            return x + (h / 2) * (first + process.drift(x + h * first, s)), None
        z = noise(t, s)
        dw = match((s - t).abs().sqrt(), z, t) * z
        kick = process.spread(x, (t + s) / 2 if process.additive else t, dw)
        u = x + h * first + kick
        if not process.additive:
            kick = 0.5 * (kick + process.spread(u, s, dw))
        return x + (h / 2) * (first + process.drift(u, s)) + kick, None


def per_state(process: SDE, x: Tensor, z: Tensor) -> Tensor:
    """Elementwise or scalar noise, ready to multiply a state."""
    return z.reshape(one_each(x)) if process.noise == "scalar" else z


def require_commuting(solver: StepSolver, process: SDE, x: Tensor, t: Tensor) -> None:
    """Raise a PairingError where g, looked at in x, shows that its noise does not commute.

    Elementwise noise commutes where each g_i looks at x_i alone; matrix noise where
    (d(G u)) G v = (d(G v)) G u for all u and v, probed on one pair.
    """
    if process.deterministic or process.additive or process.noise == "scalar" or not x.numel():
        return
    name = type(solver).__name__
    if process.noise == "elementwise":

        def diffusion(y: Tensor) -> Tensor:
            return process.diffusion(y, t).expand(y.shape)

        if own_slopes(diffusion, x, False) is None:
            raise PairingError(
                f"{name} needs elementwise noise to have a g_i that looks at x_i alone, and this "
                "one looks at other components too; use EulerMaruyama() or EulerHeun()"
            )
        return
    k = torch.arange(process.noise_shape(x)[1], dtype=x.dtype, device=x.device)
    u, v = ((1.5 + (k + shift).square().sin()).expand(len(x), -1) for shift in (0, 0.5))
    first, along_first = linearise(lambda y: process.spread(y, t, u), x)
    second, along_second = linearise(lambda y: process.spread(y, t, v), x)
    if along_first is None or along_second is None:
        return
    one, other = along_first(second), along_second(first)
    size = one.abs().amax() + other.abs().amax()
    if ((one - other).abs() > 1e3 * torch.finfo(x.dtype).eps * size).any():
        raise PairingError(
            f"{name}: this noise is declared commutative, and at t={float(t):.6g} (dg_k) g_l is "
            "not (dg_l) g_k; use EulerMaruyama() or EulerHeun()"
        )
