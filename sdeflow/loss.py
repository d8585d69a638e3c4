"""Denoising score matching: weightings and time distributions as tables.

All losses are one expectation, E_t w(t) |D(x_t, t) - x_0|^2 over x_t = alpha x_0 + sigma eps, told
apart by the weight w and by the law of t. Weights are given for the error of the denoiser D; a
weight for the noise is (alpha/sigma)^2 times it, since eps - eps* = -(alpha/sigma)(D - x_0).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .denoiser import Denoiser
from .errors import ArgumentError, ShapeError, one_of, positive_int
from .sde import GaussianSDE, match, single_log_snr

Weighting = Callable[[Denoiser, Tensor], Tensor]
Times = Callable[[GaussianSDE, Tensor], Tensor]


def _snr(sde: GaussianSDE, t: Tensor) -> Tensor:
    return torch.exp(sde.log_snr(t))


def _data(d: Denoiser, t: Tensor) -> Tensor:
    return torch.ones_like(d.sde.alpha(t))


def _noise(d: Denoiser, t: Tensor) -> Tensor:
    return _snr(d.sde, t)


def _likelihood(d: Denoiser, t: Tensor) -> Tensor:
    return d.sde.rates(t)[1] * (d.sde.alpha(t) / d.sde.sigma(t) ** 2) ** 2


def _edm(d: Denoiser, t: Tensor) -> Tensor:
    return _snr(d.sde, t) + d.sigma_data**-2


def _min_snr(d: Denoiser, t: Tensor) -> Tensor:
    return _snr(d.sde, t).clamp(max=5.0)


def _prediction(d: Denoiser, t: Tensor) -> Tensor:
    return d.skip_and_out(d.row(t), t)[1] ** -2


# fmt: off
WEIGHTINGS: dict[str, Weighting] = {
    # w(t) |D - x_0|^2 is:         w(t)                            source
    "data": _data,              # |D - x_0|^2     1
    "noise": _noise,            # |eps - eps*|^2  (alpha/sigma)^2                   Ho 2020, eq. 14
    "likelihood": _likelihood,  # g^2 |s - s*|^2  g^2 alpha^2/sigma^4               Song 2021b
    "edm": _edm,                # EDM's           (alpha/sigma)^2 + 1/sigma_data^2  Karras 2022
    "min_snr": _min_snr,        # DDPM's clamped  min((alpha/sigma)^2, 5)           Hang 2023
    "prediction": _prediction,  # |F - F*|^2      1/c_out^2; flow matching for "velocity"
}
# fmt: on
"""`noise` is DDPM's simple loss, and the sigma^2 weighting |sigma s + eps|^2 of Score-SDE."""


def _uniform(sde: GaussianSDE, u: Tensor) -> Tensor:
    return sde.t_min + (sde.T - sde.t_min) * u


def _lognormal(sde: GaussianSDE, u: Tensor) -> Tensor:
    log_sigma = -1.2 + 1.2 * _normal_quantile(u)
    return sde.time_of_log_snr(-2 * log_sigma).clamp(sde.t_min, sde.T)


def _logit_normal(sde: GaussianSDE, u: Tensor) -> Tensor:
    return (sde.T * torch.sigmoid(_normal_quantile(u))).clamp(sde.t_min, sde.T)


def _log_snr(sde: GaussianSDE, u: Tensor) -> Tensor:
    ends = single_log_snr(sde, torch.tensor([sde.t_min, 0.999 * sde.T], dtype=torch.float64))
    return sde.time_of_log_snr(ends[0] + (ends[1] - ends[0]) * u)


def _normal_quantile(u: Tensor) -> Tensor:
    tiny = torch.finfo(u.dtype).eps
    return math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-1 + tiny, 1 - tiny))


# fmt: off
TIMES: dict[str, Times] = {
    # t = quantile(u), u uniform in [0, 1]                     source
    "uniform": _uniform,            # t in [t_min, T]           Ho 2020; Song 2021
    "lognormal": _lognormal,        # log(sigma/alpha) ~ N(-1.2, 1.2^2)   Karras 2022, table 1
    "logit_normal": _logit_normal,  # logit(t/T) ~ N(0, 1)      Esser 2024, section 3.1
    "log_snr": _log_snr,            # log-SNR uniform           Kingma 2021
}
# fmt: on


def sample_times(
    sde: GaussianSDE,
    n: int,
    times: str | Times = "uniform",
    *,
    stratified: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """n training times, (n,) in float64, from the distribution named.

    generator: they are drawn, and stay, on its device; on the host without one.
    stratified: one u in each of n equal cells, which lowers the variance of the loss and leaves
    its mean (Kingma et al., 2021, appendix I.1).
    """
    n = positive_int("n", n)
    quantile = TIMES[one_of("times", times, TIMES)] if isinstance(times, str) else times
    device = None if generator is None else generator.device
    u = torch.rand(n, dtype=torch.float64, generator=generator, device=device)
    if stratified:
        cells = torch.randperm(n, generator=generator, device=device)
        u = (cells + u) / n
    return quantile(sde, u)


def denoising_loss(
    denoiser: Denoiser,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    weighting: str | Weighting = "noise",
) -> Tensor:
    """w(t) |D(x_t, t) - x_0|^2, averaged over components: one number per sample, (B,).

    x0: clean data (B, *); t: times (B,); noise: unit normals of the shape of x0. The error is
    formed on the network's own output, so that nothing is divided by a small sigma.
    Source: Vincent (2011); the weightings' sources stand in the table.
    """
    if not isinstance(denoiser, Denoiser):
        raise ArgumentError(f"denoiser must be a Denoiser(net, sde, prediction), not {denoiser!r}")
    if t.shape != x0.shape[:1]:
        raise ArgumentError(f"t has shape {tuple(t.shape)}; it must be ({x0.shape[0]},)")
    if isinstance(weighting, str):
        weighting = WEIGHTINGS[one_of("weighting", weighting, WEIGHTINGS)]
    t = t.to(torch.float64)
    x = denoiser.sde.perturb(x0, t, noise)
    error = denoiser.network(x, t) - denoiser.target(x0, noise, t)
    c_out = denoiser.skip_and_out(denoiser.row(t), t)[1]
    dtype = torch.promote_types(error.dtype, torch.float32)
    weight = (weighting(denoiser, t) * c_out**2).to(dtype=dtype, device=x.device)
    error = error.to(dtype)
    return (match(weight, error) * error.square()).unsqueeze(-1).flatten(1).mean(1)


def score_matching(
    denoiser: Denoiser,
    x0: Tensor,
    *,
    times: str | Times = "uniform",
    weighting: str | Weighting = "noise",
    generator: torch.Generator | None = None,
) -> Tensor:
    """The denoising score matching loss of a batch: a scalar to call backward() on.

    Times and noise are drawn afresh, on the host or on the device of the generator; give one for
    repeatable ones.
    """
    if not x0.is_floating_point() or not x0.numel():
        raise ShapeError(
            f"x0 is {tuple(x0.shape)} {x0.dtype}; it must be a batch of at least one sample, in "
            "floating point (images: x.float() / 127.5 - 1)"
        )
    t = sample_times(denoiser.sde, x0.shape[0], times, generator=generator)
    device = None if generator is None else generator.device
    noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=device).to(x0.device)
    return denoising_loss(denoiser, x0, t, noise, weighting).mean()
