"""Mistakes about variances, noise, eta and the reverse drift."""

from __future__ import annotations

import math

import torch
from sdeflow_plugins.solvers.ddim import DDIM
from sdeflow_plugins.solvers.ddpm import DDPM
from sdeflow_plugins.solvers.dpmpp import (
    DPMpp1S,
    DPMpp2S,
    exponential_euler,
    half_log_snr_step,
)

from sdeflow import EulerMaruyama, Heun, StepSolver, probability_flow

from .planting import planted


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
