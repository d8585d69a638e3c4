"""Stochastic Runge-Kutta methods of higher order, for Ito SDEs: `SRK` (strong), `Platen` (weak)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .derivatives import one_each
from .noise import Noise, area
from .sde import SDE, match
from .solver import Memory, StepSolver
from .solvers import per_state, require_commuting


@dataclass(frozen=True)
class SRK(StepSolver):
    """Roessler's stochastic Runge-Kutta methods of strong order 3/2: SRA1 and SRI1W1; Ito.

    Additive noise of any kind runs SRA1, with I = I_(1,0)/h = sqrt(|h|) (z/2 + zeta/sqrt(12)):

        u = x + 3/4 f h + 3/2 G(s) I
        x_s = x + (f + 2 f(u, t + 3/4 h)) h/3 + G(s) (dw - I) + G(t) I

    Elementwise noise whose g_i looks at x_i alone, and scalar noise, run SRI1W1: two drifts and
    four g a step. Other noise is refused. Order 2 on ODEs, weak order 2 on additive noise, else
    3/2. No derivatives are taken but to see, at the start of a run, what g looks at.
    Source: Roessler (2010), schemes SRA1 and SRI1W1 (SIAM J. Numer. Anal. 48(3), 922-952).
    """

    order = 2
    weak_order = 2
    strong_order = 1.5
    evaluations = 2
    needs = ("diagonal",)

    def init(self, process: SDE, x: Tensor, ts: Tensor) -> None:
        require_commuting(self, process, x, ts[0])

    def step(
        self, process: SDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise, memory: Memory
    ) -> tuple[Tensor, None]:
        h = match(s - t, x, t)
        first, late = process.drift(x, t), t + 0.75 * (s - t)
        u = x + 0.75 * h * first
        if process.deterministic:
            return x + (h / 3) * (first + 2 * process.drift(u, late)), None
        z = noise(t, s)
        mean = 0.5 * z + 12**-0.5 * area(noise, t, s)  # of W over the step, in units of sqrt|h|
        if process.additive:
            root = match((s - t).abs().sqrt(), z, t)
            u = u + 1.5 * process.spread(x, s, root * mean)
            moved = x + (h / 3) * (first + 2 * process.drift(u, late))
            kick = process.spread(x, s, root * (z - mean)) + process.spread(x, t, root * mean)
            return moved + kick, None
        root = match((s - t).abs().sqrt(), x, t)
        z, mean = per_state(process, x, z), per_state(process, x, mean)
        double, triple = (z * z - 1) / 2, (z * z - 3) * z / 6  # I_(1,1)/h and I_(1,1,1)/h^(3/2)
        middle = t + 0.25 * (s - t)
        g1 = process.diffusion(x, t)
        g2 = process.diffusion(x + (h / 4) * first + (root / 2) * g1, middle)
        g3 = process.diffusion(x + h * first - root * g1, s)
        g4 = process.diffusion(x + (h / 4) * first + root * (3 * g2 - 5 * g1 + 0.5 * g3), middle)
        second = process.drift(u + 1.5 * root * g1 * mean, late)
        kick = (
            g1 * (2 * mean - z - double - 2 * triple)
            + g2 * (4 * (z + double - mean) + 5 * triple) / 3
            + g3 * (2 * (z - mean - triple) - double) / 3
            + g4 * triple
        )
        return x + (h / 3) * (first + 2 * second) + root * kick, None


@dataclass(frozen=True)
class Platen(StepSolver):
    """Platen's explicit method of weak order 2, for noise of every kind; Ito.

    For one Wiener process, with b = x + f h and u = b + g dw,

        x_s = x + (f + f(u, s)) h/2 + (g+ + g- + 2 g) dw/4 + (g+ - g-) (dw^2 - |h|)/(4 sqrt|h|),
        g+- = g(b +- g sqrt|h|, s);

    so too, at once, for elementwise noise whose g_i looks at x_i alone (else it is refused). A
    matrix of m columns takes 4 m + 1 evaluations of G a step, and random signs, those of the
    space-time areas, stand for the Levy areas: that serves the law, not the path. Order 2 on ODEs;
    strong order 1 where the noise commutes, else 1/2.
    Source: Kloeden & Platen (1992), section 15.1, eq. 1.1 and 1.3.
    """

    order = 2
    weak_order = 2
    strong_order = 1
    evaluations = 2

    def init(self, process: SDE, x: Tensor, ts: Tensor) -> None:
        if process.noise == "elementwise":
            require_commuting(self, process, x, ts[0])

    def step(
        self, process: SDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise, memory: Memory
    ) -> tuple[Tensor, None]:
        h = match(s - t, x, t)
        first = process.drift(x, t)
        base = x + h * first
        if process.deterministic:
            return x + (h / 2) * (first + process.drift(base, s)), None
        z = noise(t, s)
        dw = match((s - t).abs().sqrt(), z, t) * z
        start = process.spread(x, t, dw)
        if process.additive:
            kick = 0.5 * (start + process.spread(x, s, dw))
        elif process.noise == "matrix":
            kick = self._matrix(process, x, base, t, s, z, area(noise, t, s))
        else:
            root, z = match((s - t).abs().sqrt(), x, t), per_state(process, x, z)
            g = process.diffusion(x, t)
            up, down = (process.diffusion(base + sign * root * g, s) for sign in (1, -1))
            kick = (root / 4) * ((up + down + 2 * g) * z + (up - down) * (z * z - 1))
        return x + (h / 2) * (first + process.drift(base + start, s)) + kick, None

    def _matrix(
        self, process: SDE, x: Tensor, base: Tensor, t: Tensor, s: Tensor, z: Tensor, zeta: Tensor
    ) -> Tensor:
        g = process.diffusion(x, t)
        m, shape = g.shape[-1], one_each(x)
        root = match((s - t).abs().sqrt(), x, t)
        signs = torch.where(zeta < 0, -1.0, 1.0).to(z)
        column = torch.arange(m, device=z.device)
        kick = (g * ((4 - 2 * m) * z).reshape(*shape, m)).sum(-1)
        for r in range(m):
            move, z_r = root * g[..., r], z[:, r : r + 1]
            # V_rj, antisymmetric, is a product of two signs: uncorrelated with all other pairs.
            v = torch.sign(column - r).to(z) * signs * signs[:, r : r + 1]
            for sign in (1, -1):
                ahead = process.diffusion(base + sign * move, s)[..., r]
                kick = kick + ahead * (z_r + sign * (z_r * z_r - 1)).reshape(shape)
                weights = (column != r).to(z) * (z + sign * (z * z_r + v))
                aside = process.diffusion(x + sign * move, t)
                kick = kick + (aside * weights.reshape(*shape, m)).sum(-1)
        return (root / 4) * kick
