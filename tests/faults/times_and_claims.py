"""Mistakes about times, and claims that are not so."""

from __future__ import annotations

from dataclasses import replace

from sdeflow_plugins.solvers.ddim import DDIM
from sdeflow_plugins.solvers.ddpm import DDPM
from sdeflow_plugins.solvers.dpmpp import (
    DPMpp2M,
    DPMpp2S,
    half_log_snr_step,
    linear_data,
)

from sdeflow import EulerMaruyama, Heun, StepSolver, TorchDiffEq

from .planting import planted, two_m


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
