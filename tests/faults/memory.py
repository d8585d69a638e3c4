"""Mistakes of multistep methods, and two that are right to plant them in."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sdeflow_plugins.solvers.dpmpp import (
    DPMpp2M,
    DPMpp3M,
)
from sdeflow_plugins.solvers.pndm import PNDM

from sdeflow import StepSolver

from .planting import planted, two_m


@planted("orders", "order", published=True)
class HalfTheSecondDifference(DPMpp3M):
    """DPM-Solver++ 3M as published, sold as what its name says."""

    order = 3


@planted("orders", "order")
class NoiseForData(DPMpp2M):
    """The formula of the data prediction fed with the noise."""

    def step(self, process, x, t, s, noise, memory):
        a, sigma = process.gaussian.kernel(x, t)
        eps = (x - a * process.denoise(x, t)) / sigma
        return two_m(process, x, eps, t, s, noise, memory)


@planted("orders", "order")
class MemoryForgotten(DPMpp2M):
    def step(self, process, x, t, s, noise, memory):
        return super().step(process, x, t, s, noise, (None, memory[1]))


@planted("orders", "order")
class MemoryNeverUpdated(DPMpp2M):
    def step(self, process, x, t, s, noise, memory):
        x, new = super().step(process, x, t, s, noise, memory)
        return x, new if memory[0] is None else memory


@planted("orders", "order")
class HalvedExtrapolation(DPMpp2M):
    def step(self, process, x, t, s, noise, memory):
        past, left = memory
        past = None if past is None else (past[0], 2 * past[1])
        return super().step(process, x, t, s, noise, (past, left))


@planted("state", "shared state")
class MemoryOnTheSolver(DPMpp2M):
    """As a stateful scheduler keeps it, and clears it at the start of a run."""

    def init(self, process, x, ts):
        object.__setattr__(self, "kept", (None, len(ts) - 1))

    def step(self, process, x, t, s, noise, memory):
        x, memory = super().step(process, x, t, s, noise, self.kept)
        object.__setattr__(self, "kept", memory)
        return x, None


@planted("orders", "order", 3)
class WeightsOfEqualSteps(PNDM):
    """Adams-Bashforth weights for equal steps, sold as third order on any grid."""

    order = 3


@planted("orders", "weak order")
class SignInTheThirdOrderSde(DPMpp3M):
    """- 1/2 where + 1/2 belongs in the coefficient of the second difference, on the SDE."""

    def step(self, process, x, t, s, noise, memory):
        moved, new = super().step(process, x, t, s, noise, memory)
        if process.deterministic or len(memory[0]) < 2:
            return moved, new
        (d0, h), (d1, h0), (d2, h1) = new[0][0], *memory[0]
        second = ((d0 - d1) / h0 - (d1 - d2) / h1) / (h0 + h1)
        return moved - process.gaussian.alpha(s) * h**2 * second, new


@dataclass(frozen=True)
class Taylor(StepSolver):
    """Third order in eps: y_s = y + h eps + h^2/2 eps' + h^3/6 eps'', y = x/alpha, in rho."""

    order = 3
    point_exact = True
    needs = ("gaussian", "ode")

    def step(self, process, x, t, s, noise, memory):
        (a_t, s_t), (a_s, s_s) = process.gaussian.kernel(x, t), process.gaussian.kernel(x, s)
        place, eps = s_t / a_t, (x - a_t * process.denoise(x, t)) / s_t
        past = ((place, eps), *(memory or ()))[:3]
        h, y = s_s / a_s - place, x / a_t
        moved = y + h * eps
        if len(past) > 1:
            first = (eps - past[1][1]) / (place - past[1][0])
            second = 0.0 * first
            if len(past) > 2:
                before = (past[1][1] - past[2][1]) / (past[1][0] - past[2][0])
                second = 2 * (first - before) / (place - past[2][0])
                first = self.here(first, second, place - past[1][0])
            moved = moved + (h**2 / 2) * first + (h**3 / 6) * second
        return a_s * moved, past

    def here(self, first, second, behind):
        """The slope at the node, from that over the interval behind it."""
        return first + behind / 2 * second


@planted("orders", "order")
class SlopeAtTheMiddle(Taylor):
    """ER-SDE-3 as published: the slope is that of the middle of the last interval."""

    def here(self, first, second, behind):
        return first


@dataclass(frozen=True)
class Corrected(StepSolver):
    """Adams-Bashforth 2 predicts, Adams-Moulton 3 corrects, in eps and rho; no evaluation more."""

    order = 3
    point_exact = True
    needs = ("gaussian", "ode")

    def step(self, process, x, t, s, noise, memory):
        (a_t, s_t), (a_s, s_s) = process.gaussian.kernel(x, t), process.gaussian.kernel(x, s)
        place, eps = s_t / a_t, (x - a_t * process.denoise(x, t)) / s_t
        y, past = x / a_t, ((place, eps),)
        if memory is not None:
            before, old = memory
            past = (past[0], *old)
            y = before + self.corrected(past)
        end = s_s / a_s
        return a_s * (y + integral(past[:2], place, end)), (y, past[:2])

    def corrected(self, past):
        """The integral from the last node to the new one, past[0]."""
        return integral(past[:3], past[1][0], past[0][0])


def integral(values, start, end):
    """Of the polynomial through (place, value) pairs, at most three, by two-point Gauss."""
    total = 0.0 * values[0][1]
    for part in (0.5 - 12**-0.5, 0.5 + 12**-0.5):
        u = start + part * (end - start)
        for place, value in values:
            others = [other for other, _ in values if other is not place]
            weight = math.prod((u - other) / (place - other) for other in others)
            total = total + (end - start) / 2 * weight * value
    return total


@planted("orders", "order")
class CorrectorWithTheWrongHistory(Corrected):
    """Each value of the past at the time of the one after it."""

    def corrected(self, past):
        shifted = (past[0], *((p, v) for (p, _), (_, v) in zip(past[1:], past[2:], strict=False)))
        return integral(shifted, past[1][0], past[0][0])


@planted("orders", "order")
class CorrectorWithHalves(Corrected):
    """1/2 and 1/2 by hand, where the weights should have been solved for."""

    def corrected(self, past):
        return (past[0][0] - past[1][0]) / 2 * (past[0][1] + past[1][1])
