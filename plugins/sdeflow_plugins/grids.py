"""Time grids of the literature beyond the core's: one formula or one published table each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdeflow.errors import ArgumentError, GridError, one_of, positive_int
from sdeflow.grid import check_grid, grid, log_snr
from sdeflow.plugins import hookimpl
from sdeflow.sde import SDE, GaussianSDE


def _log_rho_ends(sde: Any, t_max: Tensor, t_min: Tensor) -> tuple[Tensor, Tensor]:
    """log(sigma/alpha) at both ends of the log-SNR grid, which says where there is none."""
    ends = log_snr(sde, 2, t_max=float(t_max), t_min=float(t_min))
    inside = torch.where(sde.alpha(ends) > 0, ends, 0.999 * ends)
    high, _, low = -sde.log_snr(inside) / 2
    return high, low


@grid
def polyexponential(
    sde: SDE, t_max: Tensor, t_min: Tensor, u: Tensor, *, rho: float = 1.0
) -> Tensor:
    """log(sigma/alpha) falls as (1 - u)^rho; rho = 1 is the grid `log_snr` ("exponential").

    Source: Crowson (2022), k-diffusion.
    """
    if not rho > 0:
        raise ArgumentError(f"rho={rho!r} must be > 0")
    high, low = _log_rho_ends(sde, t_max, t_min)
    return sde.time_of_log_snr(-2 * (low + (high - low) * (1 - u) ** rho))  # type: ignore[attr-defined]


@grid
def arctan(sde: SDE, t_max: Tensor, t_min: Tensor, u: Tensor, *, std: float = 0.5) -> Tensor:
    """Uniform in the angle atan(sigma/(alpha std)), the best grid of DDIM on Gaussian data.

    std: the standard deviation of the data. On such data DDIM's std is the true one times the
    product of cos(step of the angle), which equal steps make largest: it falls short by about
    pi^2/(8 N). std = 1 is the grid `kl_optimal` of other libraries.
    Source: Sabour et al. (2024), Align your steps, section 3, for the VE case.
    """
    if not std > 0:
        raise ArgumentError(f"std={std!r} must be > 0")
    high, low = _log_rho_ends(sde, t_max, t_min)
    high, low = (torch.atan(torch.exp(end) / std) for end in (high, low))
    return sde.time_of_log_snr(-2 * torch.log(std * torch.tan(high + u * (low - high))))  # type: ignore[attr-defined]


@grid
def angle(
    sde: SDE, t_max: Tensor, t_min: Tensor, u: Tensor, *, std: float = 0.5, power: float = 2 / 3
) -> Tensor:
    """Uniform in atan((sigma/(alpha std))^power): between `arctan` and `log_snr`.

    std: the standard deviation of the data. power: 1 is `arctan`, and the smaller it is the nearer
    the grid is to `log_snr`. The best grid in benchmarks/nfe_error.py, with solvers on v above all.
    """
    if not (std > 0 and power > 0):
        raise ArgumentError(f"std={std!r} and power={power!r} must be > 0")
    high, low = _log_rho_ends(sde, t_max, t_min)
    high, low = (torch.atan(torch.exp(power * (end - math.log(std)))) for end in (high, low))
    level = math.log(std) + torch.log(torch.tan(high + u * (low - high))) / power
    return sde.time_of_log_snr(-2 * level)  # type: ignore[attr-defined]


@grid
def beta(
    sde: SDE, t_max: Tensor, t_min: Tensor, u: Tensor, *, a: float = 0.6, b: float = 0.6
) -> Tensor:
    """Quantiles of a Beta(a, b) law in t: fine at both ends where a, b < 1.

    Source: Lee et al. (2024), Beta sampling is all you need.
    """
    from scipy.special import betaincinv

    if not (a > 0 and b > 0):
        raise ArgumentError(f"a={a!r} and b={b!r} must be > 0")
    quantile = torch.as_tensor(betaincinv(a, b, (1 - u).numpy()), dtype=torch.float64)
    return t_min + (t_max - t_min) * quantile


@grid
def shift(sde: SDE, t_max: Tensor, t_min: Tensor, u: Tensor, *, factor: float = 3.0) -> Tensor:
    """t -> f t/(1 + (f - 1) t) of uniform times t in [0, T], T = 1: finer near the noise for f > 1.

    For flows at high resolution; t_min = 0 makes the last step of n a step to the data, like the
    others. Source: Esser et al. (2024), SD3, eq. 23.
    """
    if not factor > 0:
        raise ArgumentError(f"factor={factor!r} must be > 0; 1 is the grid 'uniform'")
    return _shifted(sde, t_max, t_min, u, math.log(factor))


@grid
def dynamic_shift(
    sde: SDE, t_max: Tensor, t_min: Tensor, u: Tensor, *, tokens: int = 1024
) -> Tensor:
    """The grid `shift` with log f linear in the number of image tokens: 0.5 at 256, 1.15 at 4,096.

    tokens: (height/16) (width/16) for an image in an 8-fold latent space with patches of 2.
    Source: Black Forest Labs (2024), FLUX.1.
    """
    mu = 0.5 + (1.15 - 0.5) * (positive_int("tokens", tokens) - 256) / (4096 - 256)
    return _shifted(sde, t_max, t_min, u, mu)


def _shifted(sde: SDE, t_max: Tensor, t_min: Tensor, u: Tensor, mu: float) -> Tensor:
    """sigmoid(logit(t/T) + mu) of times that become uniform between the ends before the shift."""

    def move(t: Tensor, mu: float) -> Tensor:
        factor = math.exp(mu)
        return factor * t / (1 + (factor - 1) * t)

    high, low = (move(end / sde.T, -mu) for end in (t_max, t_min))
    return sde.T * move(high + u * (low - high), mu)


# fmt: off
ALIGNED = {
    # sigma/alpha at the ends of 10 steps, from the noise    Sabour et al. (2024), project page
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}
# fmt: on


def align_your_steps(
    sde: SDE, n: int, *, model: str = "sd15", stretch: bool = False, to_zero: bool = False
) -> Tensor:
    """Published levels, found by minimising a bound on the error for a model; log-linear between.

    model: "sd15", "sdxl" or "svd". stretch: move the ends of the table to those of the SDE, so
    that its shape alone is used; otherwise its levels must lie within the SDE's.
    Source: Sabour, Fidler & Kreis (2024), Align your steps.
    """
    n = positive_int("steps", n)
    if not isinstance(sde, GaussianSDE):
        raise GridError(
            f"this grid needs log-SNR, which {type(sde).__name__} has not; use the grid 'uniform'"
        )
    steps = n - 1 if to_zero else n
    table = torch.tensor(ALIGNED[one_of("model", model, ALIGNED)], dtype=torch.float64).log()
    place = torch.linspace(0, 1, max(steps, 1) + 1, dtype=torch.float64) * (len(table) - 1)
    left = place.floor().long().clamp(max=len(table) - 2)
    levels = torch.lerp(table[left], table[left + 1], place - left)
    ends = torch.tensor([sde.T, sde.t_min], dtype=torch.float64)
    high, low = _log_rho_ends(sde, *ends)
    if stretch:
        levels = low + (levels - table[-1]) * (high - low) / (table[0] - table[-1])
    elif not (low - 1e-9 <= levels[-1] and levels[0] <= high + 1e-9):
        raise GridError(
            f"align_your_steps({model!r}) is at sigma/alpha from {float(table[0].exp()):.4g} to "
            f"{float(table[-1].exp()):.4g}, and {sde!r} has {float(high.exp()):.4g} to "
            f"{float(low.exp()):.4g}; use stretch=True for the shape of the table alone"
        )
    times = sde.time_of_log_snr(-2 * levels)
    if steps == 0:
        times = times[:1]
    return check_grid(torch.cat((times, torch.zeros(1).double())) if to_zero else times)


@hookimpl
def sdeflow_grids() -> dict[str, Callable[..., Any]]:
    return {
        "polyexponential": polyexponential,
        "arctan": arctan,
        "angle": angle,
        "beta": beta,
        "shift": shift,
        "dynamic_shift": dynamic_shift,
        "align_your_steps": align_your_steps,
    }
