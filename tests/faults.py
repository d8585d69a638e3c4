"""Historical mistakes of samplers, each planted in a copy of a solver that is right."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from sdeflow_plugins.ddim import DDIM
from sdeflow_plugins.ddpm import DDPM
from sdeflow_plugins.dpmpp import (
    DPMpp1S,
    DPMpp2M,
    DPMpp2S,
    DPMpp3M,
    exponential_euler,
    half_log_snr_step,
    linear_data,
)
from sdeflow_plugins.pc import PredictorCorrector
from sdeflow_plugins.pndm import PNDM

from sdeflow import EulerMaruyama, Heun, StepSolver, TorchDiffEq, probability_flow

FAULTS: dict[Any, tuple[str, str]] = {}
"""solver -> the group of checks that runs it, and the check that must fail."""


def planted(group, check, *args, **options):
    """Registers a fault."""

    def register(cls):
        cls = dataclass(frozen=True)(cls)
        FAULTS[cls(*args, **options)] = (group, check)
        return cls

    return register


# ---- times


def two_m(process, x, data, t, s, noise, memory):
    """DPM-Solver++ 2M with D given."""
    h = half_log_snr_step(process, x, t, s)
    extrapolated = data
    if memory is not None:
        extrapolated = data + torch.where(h.isfinite(), h / (2 * memory[1]), 0.0) * (
            data - memory[0]
        )
    mean, std = exponential_euler(process, x, extrapolated, t, s)
    return (mean if process.deterministic else mean + std * noise(t, s)), (data, h)


@planted("orders", "order")
class OffByOneInTheGrid(DPMpp2M):
    """The network is asked at the time of the next node."""

    def step(self, process, x, t, s, noise, memory):
        return two_m(process, x, process.denoise(x, s), t, s, noise, memory)


@planted("short grids", "sigma = 0")
class OffByOneAtTheEnd(DDIM):
    """The same in a method of first order, which stays one: at the end it asks at sigma = 0."""

    def step(self, process, x, t, s, noise, memory):
        mean, std = process.gaussian.posterior(x, process.denoise(x, s), t, s, process.eta)
        return mean + std * noise(t, s), None


@planted("evaluations", "times of evaluation")
class BeyondTheEnd(Heun):
    """The second stage is asked at twice the step."""

    def step(self, process, x, t, s, noise, memory):
        h, late = s - t, (s - (t - s)).clamp_min(1e-9)
        first = process.drift(x, t)
        moved = x + h / 2 * (first + process.drift(x + h * first, late))
        return moved + h.abs().sqrt() * process.spread(x, t, noise(t, s)), None


@planted("points", "one-point data")
class SigmaOfTheWrongTime(DDIM):
    def step(self, process, x, t, s, noise, memory):
        data, sde = process.denoise(x, t), process.gaussian
        mean, std = sde.posterior(x, data, t, s, process.eta)
        a, wrong = sde.alpha(s), sde.sigma(t) / sde.sigma(s)
        return a * data + wrong * (mean - a * data) + std * noise(t, s), None


@planted("orders", "order")
class StagesMoved(StepSolver):
    """DPM-Solver++ 3S with its stages at halves of the step; the weights stay those of thirds."""

    order = evaluations = 3
    point_exact = True
    needs = ("gaussian", "ode", "one alpha")

    def step(self, process, x, t, s, noise, memory):
        data, sde = process.denoise(x, t), process.gaussian
        slope, middle = 0.0 * data, (sde.log_snr(t) + sde.log_snr(s)) / 2
        for m in (sde.time_of_log_snr(middle), s):
            stage = linear_data(process, x, data, slope, t, m)
            slope = (process.denoise(stage, m) - data) / half_log_snr_step(process, x, t, m)
        return linear_data(process, x, data, slope, t, s), None


@planted("laws", "data to noise")
class StepOfOneSign(EulerMaruyama):
    """Right down in time; data are not carried to noise."""

    needs = ("reverse",)

    def step(self, process, x, t, s, noise, memory):
        h = -(s - t).abs()
        kick = h.abs().sqrt() * process.spread(x, t, noise(t, s))
        return x + h * process.drift(x, t) + kick, None


@planted("forward", "a forward SDE")
class NeverUpInTime(EulerMaruyama):
    """It takes forward SDEs, and runs them down."""

    def step(self, process, x, t, s, noise, memory):
        h = -(s - t).abs()
        kick = h.abs().sqrt() * process.spread(x, t, noise(t, s))
        return x + h * process.drift(x, t) + kick, None

    solve = StepSolver.solve
    finish = StepSolver.finish


# ---- variances and noise


@planted("points", "one-point data")
class VarianceForStd(DDIM):
    def step(self, process, x, t, s, noise, memory):
        mean, std = process.gaussian.posterior(x, process.denoise(x, t), t, s, process.eta)
        return mean + std**2 * noise(t, s), None


@planted("points", "one-point data")
class StdForVariance(DDIM):
    def step(self, process, x, t, s, noise, memory):
        mean, std = process.gaussian.posterior(x, process.denoise(x, t), t, s, process.eta)
        return mean + std**0.5 * noise(t, s), None


@planted("points", "points at sigma = 0")
class NoiseInTheLastStep(DDIM):
    """The last step to sigma = 0 adds some of the noise of the step before."""

    def step(self, process, x, t, s, noise, memory):
        mean, std = process.gaussian.posterior(x, process.denoise(x, t), t, s, process.eta)
        std = torch.where(s > 0, std, 0.1 * process.gaussian.sigma(t))
        return mean + std * noise(t, s), None


@planted("points", "one-point data")
class NoiseAddedTwice(DDIM):
    def step(self, process, x, t, s, noise, memory):
        mean, std = process.gaussian.posterior(x, process.denoise(x, t), t, s, process.eta)
        return mean + std * noise(t, s) + std * noise(t, s), None


@planted("noise", "intervals of noise")
class NoiseDrawnTwice(DDIM):
    """Of the right law, but no function of a Brownian path."""

    def step(self, process, x, t, s, noise, memory):
        mean, std = process.gaussian.posterior(x, process.denoise(x, t), t, s, process.eta)
        return mean + std * (noise(t, s) + noise(t, s)) / math.sqrt(2), None


@planted("noise", "intervals of noise")
class NoiseOfTheWholeStepForItsHalf(DPMpp2S):
    def step(self, process, x, t, s, noise, memory):
        return super().step(process, x, t, s, lambda u, v: noise(t, s), memory)


@planted("laws", "marginals, eta = 1")
class NoiseOfTheStepBefore(DDIM):
    """One draw serves the whole run."""

    def step(self, process, x, t, s, noise, memory):
        z = noise(t, s) if memory is None else memory
        mean, std = process.gaussian.posterior(x, process.denoise(x, t), t, s, process.eta)
        return mean + std * z, z


@planted("orders", "weak order")
class IndependentStage(DPMpp2S):
    """SDE-DPM-Solver++ 2S with noise of its own in the stage, not that of the step so far."""

    def step(self, process, x, t, s, noise, memory):
        if process.deterministic:
            return super().step(process, x, t, s, noise, memory)
        sde = process.gaussian
        m = sde.time_of_log_snr((sde.log_snr(t) + sde.log_snr(s)) / 2)
        stage, std = exponential_euler(process, x, process.denoise(x, t), t, m)
        data = process.denoise(stage + std * noise(t, m), m)
        mean, std = exponential_euler(process, x, data, t, s)
        return mean + std * noise(t, s), None


@planted("noise", "seed")
class NoiseOfTheGlobalGenerator(EulerMaruyama):
    def step(self, process, x, t, s, noise, memory):
        return super().step(process, x, t, s, lambda t, s: torch.randn_like(x), memory)

    solve = StepSolver.solve
    finish = StepSolver.finish


@planted("batch", "batch, eta = 1")
class OneNoiseForTheBatch(DDIM):
    def step(self, process, x, t, s, noise, memory):
        mean, std = process.gaussian.posterior(x, process.denoise(x, t), t, s, process.eta)
        return mean + std * noise(t, s)[:1], None


# ---- eta


@planted("laws", "paths, eta = 0.5")
class EtaOfTheVariance(DDIM):
    """eta scales the variance, not the standard deviation: the marginals are the same."""

    def step(self, process, x, t, s, noise, memory):
        eta = math.sqrt(process.eta)
        mean, std = process.gaussian.posterior(x, process.denoise(x, t), t, s, eta)
        return mean + std * noise(t, s), None


@planted("laws", "paths, eta = 0.5")
class EtaSquared(DDIM):
    def step(self, process, x, t, s, noise, memory):
        mean, std = process.gaussian.posterior(x, process.denoise(x, t), t, s, process.eta**2)
        return mean + std * noise(t, s), None


@planted("laws", "paths, eta = 1")
class EtaIgnored(DDIM):
    """An ODE step on an SDE."""

    def step(self, process, x, t, s, noise, memory):
        return process.gaussian.posterior(x, process.denoise(x, t), t, s, 0.0)[0], None


@planted("laws", "paths, eta = 1")
class HeunThatIgnoresEta(Heun):
    needs = ("reverse",)

    def step(self, process, x, t, s, noise, memory):
        flow = probability_flow(process.forward, process.score)
        return super().step(flow, x, t, s, noise, memory)


@planted("laws", "paths, eta = 1")
class VarianceOfVpAlone(DDIM):
    """The usual print of DDIM's variance, which alpha = 1 turns into zero: no noise on VE."""

    def step(self, process, x, t, s, noise, memory):
        sde, data = process.gaussian, process.denoise(x, t)
        (a_t, s_t), (a_s, s_s) = sde.kernel(x, t), sde.kernel(x, s)
        v = (process.eta * s_s / s_t) ** 2 * (1 - (a_t / a_s) ** 2).clamp_min(0)
        mean = a_s * data + (s_s**2 - v).clamp_min(0).sqrt() * (x - a_t * data) / s_t
        return mean + v.sqrt() * noise(t, s), None


@planted("orders", "order")
class NoiseOnTheOde(DDPM):
    """DDPM takes the probability flow for its reverse SDE."""

    order = 1
    needs = ("gaussian",)


@planted("runs", "runs")
class AcceptsMoreThanItDeclares(DDPM):
    needs = ("gaussian",)


@planted("points", "one-point data")
class DecayLeftOut(DPMpp1S):
    """SDE-DPM-Solver++ without the factor e^(-tau^2 h)."""

    def step(self, process, x, t, s, noise, memory):
        mean, std = exponential_euler(process, x, process.denoise(x, t), t, s)
        (_, s_t), (_, s_s) = process.gaussian.kernel(x, t), process.gaussian.kernel(x, s)
        h = half_log_snr_step(process, x, t, s)
        mean = mean + (s_s / s_t) * (1 - torch.exp(-(process.eta**2) * h)) * x
        return mean + std * noise(t, s), None


# ---- the reverse drift


@planted("laws", "marginals, eta = 1")
class TwiceTheSquareOfG(EulerMaruyama):
    needs = ("reverse",)

    def step(self, process, x, t, s, noise, memory):
        h, drift = s - t, process.drift(x, t)
        drift = 2 * drift - process.forward.drift(x, t)
        return x + h * drift + h.abs().sqrt() * process.spread(x, t, noise(t, s)), None


@planted("laws", "marginals, eta = 1")
class SignOfTheScore(EulerMaruyama):
    needs = ("reverse",)

    def step(self, process, x, t, s, noise, memory):
        h, drift = s - t, 2 * process.forward.drift(x, t) - process.drift(x, t)
        return x + h * drift + h.abs().sqrt() * process.spread(x, t, noise(t, s)), None


@planted("laws", "marginals, eta = 0")
class ForwardSign(EulerMaruyama):
    """The drift is added for a time step |h|, as popular articles print it."""

    needs = ("reverse",)

    def step(self, process, x, t, s, noise, memory):
        h = (s - t).abs()
        return x + h * process.drift(x, t) + h.sqrt() * process.spread(x, t, noise(t, s)), None


# ---- multistep


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
        return super().step(process, x, t, s, noise, None)


@planted("orders", "order")
class MemoryNeverUpdated(DPMpp2M):
    def step(self, process, x, t, s, noise, memory):
        x, new = super().step(process, x, t, s, noise, memory)
        return x, new if memory is None else memory


@planted("orders", "order")
class HalvedExtrapolation(DPMpp2M):
    def step(self, process, x, t, s, noise, memory):
        memory = None if memory is None else (memory[0], 2 * memory[1])
        return super().step(process, x, t, s, noise, memory)


@planted("state", "shared state")
class MemoryOnTheSolver(DPMpp2M):
    """As a stateful scheduler keeps it, and clears it at the start of a run."""

    def init(self, process, x, ts):
        object.__setattr__(self, "kept", None)

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
        moved, past = super().step(process, x, t, s, noise, memory)
        if process.deterministic or len(memory or ()) < 2:
            return moved, past
        (d0, h), (d1, h0), (d2, h1) = past[0], memory[0], memory[1]
        second = ((d0 - d1) / h0 - (d1 - d2) / h1) / (h0 + h1)
        return moved - process.gaussian.alpha(s) * h**2 * second, past


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


# ---- claims


@planted("orders", "order")
class FirstOrderSoldAsSecond(EulerMaruyama):
    order = 2


@planted("orders", "weak order")
class FirstWeakOrderSoldAsSecond(EulerMaruyama):
    weak_order = 2


@planted("evaluations", "evaluations")
class OneEvaluationOfTwo(Heun):
    evaluations = 1


@planted("points", "one-point data", "large")
class LargeVarianceSoldAsExact(DDPM):
    point_exact = True


@planted("orders", "tolerance")
class ToleranceIgnored(TorchDiffEq):
    def solve(self, process, x, ts, noise):
        return replace(TorchDiffEq(), rtol=1e-2, atol=1e-2).solve(process, x, ts, noise)

    end = solve


@planted("refusals", "refusals")
class AcceptsWhatItCannotIntegrate(DDIM):
    """It asks for alpha and sigma, and does not say so."""

    needs = ()


@planted("refusals", "refusals")
class AcceptsElementwiseSchedules(DPMpp2S):
    """It asks for the time at which log-SNR has a value, where there are many."""

    needs = ("gaussian",)


# ---- arithmetic


@planted("short grids", "sigma = 0")
class LogarithmOfZero(DPMpp2M):
    """The step to sigma = 0 extrapolates over an infinite step in lambda."""

    def step(self, process, x, t, s, noise, memory):
        data, h = process.denoise(x, t), half_log_snr_step(process, x, t, s)
        extrapolated = data
        if memory is not None:
            extrapolated = data + h / (2 * memory[1]) * (data - memory[0])
        mean, std = exponential_euler(process, x, extrapolated, t, s)
        return mean + std * noise(t, s), (data, h)


@planted("points", "one-point data")
class ScheduleInFloat32(DDIM):
    def step(self, process, x, t, s, noise, memory):
        data, sde = process.denoise(x, t), process.gaussian
        (a_t, s_t), (a_s, s_s) = ((sde.alpha(u).float(), sde.sigma(u).float()) for u in (t, s))
        two_h = (sde.log_snr(s) - sde.log_snr(t)).float()
        kept = 1 - process.eta**2 * -torch.expm1(-two_h)
        eps = (x - a_t.double() * data) / s_t.double()
        std = (process.eta * s_s * torch.sqrt(-torch.expm1(-two_h))).double()
        return a_s.double() * data + (s_s * kept.sqrt()).double() * eps + std * noise(t, s), None


@planted("points", "points near the data")
class OneMinusAlphaSquared(DDIM):
    """sigma as sqrt(1 - alpha^2) where that is so: nothing is left of it near the data."""

    def step(self, process, x, t, s, noise, memory):
        data, sde = process.denoise(x, t), process.gaussian
        mean, std = sde.posterior(x, data, t, s, process.eta)
        a, sigma = sde.alpha(s), sde.sigma(s)
        if abs(float(a**2 + sigma**2) - 1) < 1e-12:
            ratio = (1 - a**2).sqrt() / sigma
            mean, std = a * data + ratio * (mean - a * data), ratio * std
        return mean + std * noise(t, s), None


# ---- tensors


@planted("batch", "batch, eta = 0")
class NormsOverTheBatch(PredictorCorrector):
    """Langevin steps as in the usual code: norms are means over the batch."""

    def step(self, process, x, t, s, noise, memory):
        x, memory = self.predictor.step(process, x, t, s, noise, memory)
        a, sigma = process.gaussian.kernel(x, s)
        if sigma == 0:
            return x, memory
        score, z = (a * process.denoise(x, s) - x) / sigma**2, noise(t, s)
        size = self.snr * z.flatten(1).norm(dim=1).mean() / score.flatten(1).norm(dim=1).mean()
        return x + 2 * size**2 * score + 2 * size * z, memory


@planted("batch", "batch, eta = 0")
class RmsOverTheBatch(Heun):
    """It halves its step where the error is large, in the root mean square over the batch."""

    needs = ("ode",)

    def step(self, process, x, t, s, noise, memory):
        whole, _ = super().step(process, x, t, s, noise, None)
        error = (whole - x - (s - t) * process.drift(x, t)).square().mean().sqrt()
        if error < 0.05:
            return whole, None
        m = (t + s) / 2
        half, _ = super().step(process, x, t, m, noise, None)
        return super().step(process, half, m, s, noise, None)


@planted("host", "no host synchronisation")
class ItemInTheLoop(DDIM):
    def step(self, process, x, t, s, noise, memory):
        x, memory = super().step(process, x, t, s, noise, memory)
        return x / max(1.0, x.abs().max().item() / 1e6), memory


@planted("host", "no host synchronisation")
class DeviceByHand(DDIM):
    def step(self, process, x, t, s, noise, memory):
        x, memory = super().step(process, x, t, s, noise, memory)
        return x + torch.zeros(x.shape, device="cpu"), memory


@planted("shapes", "shapes, dtypes, devices")
class DtypeByHand(DDIM):
    def step(self, process, x, t, s, noise, memory):
        x, memory = super().step(process, x, t, s, noise, memory)
        return x.to(torch.float32), memory


@planted("shapes", "shapes, dtypes, devices")
class VectorsAlone(DDIM):
    """A threshold along the last axis of the state, which is all of it for vectors."""

    def step(self, process, x, t, s, noise, memory):
        x, memory = super().step(process, x, t, s, noise, memory)
        return torch.minimum(x, 0.7 * x.abs().amax(-1, keepdim=True)), memory


@planted("writes", "writes")
class WritesIntoTheState(DDIM):
    def step(self, process, x, t, s, noise, memory):
        mean, std = process.gaussian.posterior(x, process.denoise(x, t), t, s, process.eta)
        return x.copy_(mean + std * noise(t, s)), None


@planted("writes", "writes")
class WritesIntoTheNoise(DDIM):
    def step(self, process, x, t, s, noise, memory):
        mean, std = process.gaussian.posterior(x, process.denoise(x, t), t, s, process.eta)
        return noise(t, s).mul_(std).add_(mean), None


@planted("gradients", "gradients, eta = 0")
class DetachedScore(DDIM):
    """Gradients stop at the network, as under a decorator no_grad on the step."""

    def step(self, process, x, t, s, noise, memory):
        data = process.denoise(x, t).detach()
        mean, std = process.gaussian.posterior(x, data, t, s, process.eta)
        return mean + std * noise(t, s), None


@planted("scores", "scores")
class DenoisersAlone(DDIM):
    """It reads D off the score's own method, which not every score has."""

    def step(self, process, x, t, s, noise, memory):
        data = process.score.denoise(x, t)
        mean, std = process.gaussian.posterior(x, data, t, s, process.eta)
        return mean + std * noise(t, s), None


@planted("non-finite", "NaN in the score, eta = 0")
class NanMadeZero(DDIM):
    def step(self, process, x, t, s, noise, memory):
        x, memory = super().step(process, x, t, s, noise, memory)
        return torch.nan_to_num(x), memory


@planted("tableau", "tableau, eta = 0")
class CoefficientsByTheStep(DDIM):
    """What a step computes depends on how often it was called: traced once, it differs."""

    def step(self, process, x, t, s, noise, memory):
        CALLS.append(0)
        x, memory = super().step(process, x, t, s, noise, memory)
        return (1 + 1e-6 * len(CALLS)) * x, memory


CALLS: list[int] = []
HONEST = (Taylor(), Corrected())
