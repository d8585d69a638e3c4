"""Mistakes of arithmetic, and about tensors."""

from __future__ import annotations

import torch
from sdeflow_plugins.solvers.ddim import DDIM
from sdeflow_plugins.solvers.dpmpp import (
    DPMpp2M,
    exponential_euler,
    half_log_snr_step,
)
from sdeflow_plugins.solvers.pc import PredictorCorrector

from sdeflow import Heun

from .planting import planted


@planted("short grids", "sigma = 0")
class LogarithmOfZero(DPMpp2M):
    """The step to sigma = 0 extrapolates over an infinite step in lambda."""

    def step(self, process, x, t, s, noise, memory):
        data, h = process.denoise(x, t), half_log_snr_step(process, x, t, s)
        extrapolated = data
        past, left = memory
        if past is not None:
            extrapolated = data + h / (2 * past[1]) * (data - past[0])
        mean, std = exponential_euler(process, x, extrapolated, t, s)
        return mean + std * noise(t, s), ((data, h), left - 1)


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
