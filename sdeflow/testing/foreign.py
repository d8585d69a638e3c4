"""Foreign samplers: any f(denoise, x_T, ts) -> x, run on noise of ours, and the law of what they
return.

Nothing is asked of their code but that their noise comes from torch. On Gaussian data a sampler
with fixed steps is affine in x_T and its noise: a run on unit vectors gives its exact output law.
`audit` measures them; the adapters for other libraries are in `adapters`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ArgumentError, SdeflowError
from ..processes import EDM
from ..sde import GaussianSDE
from .intercept import Intercept, UnitVectors
from .law import Affine
from .problems import GaussianData

Denoise = Callable[[Tensor, Tensor], Tensor]
"""E[x_0 | x_t = x] for x (B, K) and t () or (B,)."""
Run = Callable[[Denoise, Tensor, Tensor], Tensor]
"""f(denoise, x_T, ts) -> x: from ts[0] down to ts[-1]."""

DOUBLE = torch.float64


@dataclass(frozen=True, eq=False)
class Foreign:
    """A sampler of other make, with what it must be given.

    run: f(denoise, x_T, ts) -> x, where `denoise(x, t)` is E[x_0 | x_t = x] and ts are
        decreasing times of `sde`.
    sde: the process whose alpha and sigma its states follow.
    """

    run: Run
    sde: GaussianSDE = field(default_factory=EDM)
    name: str = "sampler"


def foreign(function: Run, sde: GaussianSDE | None = None, name: str | None = None) -> Foreign:
    """A sampler written as f(denoise, x_T, ts) -> x, ready for `audit`.

    sde: the process whose times and states the function works in; EDM() (alpha = 1, sigma = t)
        where nothing is said.
    """
    if not callable(function):
        raise ArgumentError(f"function={function!r} must be a callable f(denoise, x_T, ts) -> x")
    name = name or str(getattr(function, "__name__", type(function).__name__))
    return Foreign(function, sde or EDM(), name)


class Endless(SdeflowError):
    """A run has evaluated the denoiser far more often than its steps can account for."""


def run_on(
    sampler: Foreign, denoise: Denoise, x: Tensor, ts: Tensor, noise: Intercept | None = None
) -> Tensor:
    """What the sampler makes of x, with normals from `noise`, or from torch seeded with 0."""
    calls, most = [0], 1000 + 100 * len(ts)

    def bounded(x: Tensor, t: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] > most:
            raise Endless(f"{most} evaluations on a grid of {len(ts) - 1} steps, and no end")
        return denoise(x, t)

    with torch.no_grad(), torch.random.fork_rng(), noise or nullcontext():
        torch.manual_seed(0)
        return sampler.run(bounded, x.clone(), ts.clone())


def output_law_of(
    sampler: Foreign, ts: Tensor, data: GaussianData, tolerance: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """Mean and variance, (K,) each, of what a sampler makes of x_T from the law at ts[0].

    Exact but for the sampler's own rounding: its run on unit vectors of x_T and of each noise it
    draws. A run that is not affine in them is refused with an ArgumentError.
    """
    law = _affine(sampler, ts, data, tolerance)
    mean, variance = data.law(ts[0])
    return law.offset + law.gain * mean, law.gain**2 * variance + law.noise


def _affine(sampler: Foreign, ts: Tensor, data: GaussianData, tolerance: float) -> Affine:
    width = data.mean.shape[0]
    count = UnitVectors(1, width)
    run_on(sampler, data.denoise, torch.zeros(1, width, dtype=DOUBLE), ts, count)
    noise = UnitVectors(3 + count.draws, width)
    x = torch.zeros(noise.rows, width, dtype=DOUBLE)
    far = 4 * data.law(ts[0])[1].sqrt()  # as far as samples go: a clamp on the way is noticed
    x[1], x[2] = far, -far / 2
    out = run_on(sampler, data.denoise, x, ts, noise).double()
    b, a, c = out[0], out[1] - out[0], out[3:] - out[0]
    weights = torch.arange(len(c), dtype=DOUBLE).cos().unsqueeze(1)
    expected = b - a / 2 + (weights * c).sum(0)
    size = 1 + b.abs() + a.abs() + c.abs().sum(0)
    if noise.draws != count.draws or not bool(
        ((out[2] - expected).abs() <= tolerance * size).all()
    ):
        raise ArgumentError(
            f"{sampler.name} is not affine on Gaussian data (a combination gives "
            f"{out[2].tolist()}, its parts {expected.tolist()}); its law cannot be read off"
        )
    return Affine(b, a / far, (c**2).sum(0))
