"""Ito and Stratonovich: the correction between the two, and a process seen in the other one.

    dX = f dt + G dw  (Ito)   =   dX = b dt + G o dw  (Stratonovich),
    f = b + c,   c_i = 1/2 sum_jk (d_j G_ik) G_jk = 1/2 (sum_k (dg_k) g_k)_i     run up in time,
    f = b - c                                                                     run down in time

Run down, as a reverse SDE is, the clock T - t turns both drifts around and G not: -f = -b + c.
Where G does not depend on the state c = 0, and the two agree.
Source: Kloeden & Platen (1992), section 4.9.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .derivatives import linearise, transport
from .errors import ArgumentError, positive_int, whole
from .sde import SDE


def correction(sde: SDE, x: Tensor, t: Tensor) -> Tensor:
    """c = 1/2 sum_k (dg_k) g_k at x, of its shape: the Ito drift less the Stratonovich one, in a
    clock that runs with the process.

    A quarter of the divergence for elementwise noise, one Jacobian-vector product for scalar
    noise, m of them for a matrix of m columns; zero where g does not depend on x.
    """
    if sde.additive or sde.deterministic:
        return torch.zeros_like(x)
    if sde.noise == "elementwise":
        return sde.divergence(x, t) / 4  # c_i = g_i d_i g_i / 2 = d_i (g_i^2) / 4
    return transport(lambda y: sde.diffusion(y, t), sde.noise, x) / 2


def ito_drift(sde: SDE, x: Tensor, t: Tensor) -> Tensor:
    """The drift of `sde` in the Ito sense, whichever it was declared in."""
    drift = sde.drift(x, t)
    if sde.calculus == "ito" or sde.additive or sde.deterministic:
        return drift
    return drift + sde.direction * correction(sde, x, t)


def in_calculus(process: SDE, calculus: str) -> SDE:
    """The same process with its drift in the sense of `calculus`, "ito" or "stratonovich": itself
    where it is in that sense already, or the two agree."""
    if process.calculus == calculus or process.additive or process.deterministic:
        return process
    return Converted(process)


@dataclass(frozen=True)
class Wrapped(SDE):
    """A process that is another one in all but what a subclass overrides."""

    process: SDE

    @property
    def T(self) -> float:  # type: ignore[override]
        """The last time."""
        return self.process.T

    @property
    def noise(self) -> str:  # type: ignore[override]
        """The kind of noise."""
        return self.process.noise

    @property
    def calculus(self) -> str:  # type: ignore[override]
        """The sense of the drift."""
        return self.process.calculus

    @property
    def additive(self) -> bool:  # type: ignore[override]
        """Whether g is known not to depend on x."""
        return self.process.additive

    @property
    def commutative(self) -> bool:  # type: ignore[override]
        """Whether matrix noise is known to commute."""
        return self.process.commutative

    @property
    def direction(self) -> int:  # type: ignore[override]
        """+1 up in time, -1 down."""
        return self.process.direction

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return self.process.drift(x, t)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return self.process.diffusion(x, t)

    def noise_shape(self, x: Tensor) -> torch.Size:
        return self.process.noise_shape(x)

    def spread(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        return self.process.spread(x, t, z)

    def covariance_product(self, x: Tensor, t: Tensor, v: Tensor) -> Tensor:
        return self.process.covariance_product(x, t, v)

    def divergence(self, x: Tensor, t: Tensor) -> Tensor:
        return self.process.divergence(x, t)

    def __getattr__(self, name: str) -> Any:
        """What the process has beside: its parameters, its closed forms."""
        if name.startswith("__") or name == "process":  # asked for by copy, before it is set
            raise AttributeError(name)
        return getattr(self.process, name)


class Converted(Wrapped):
    """An Ito process with its Stratonovich drift, or the other way round."""

    @property
    def calculus(self) -> str:  # type: ignore[override]
        """The other one."""
        return "ito" if self.process.calculus == "stratonovich" else "stratonovich"

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        c = correction(self.process, x, t)
        to_ito = self.process.calculus == "stratonovich"
        added = c if to_ito == (self.process.direction > 0) else -c
        return self.process.drift(x, t) + added


@dataclass(frozen=True)
class Hutchinson(Wrapped):
    """A forward SDE whose divergence is estimated: for large states with coupled noise.

        div(G G^T) = E[ d(G G^T v) v ],   v random signs;   the mean over `probes` of them

    One Jacobian-vector product a probe, where the exact divergence takes d of them. Use it where
    the SDE would go: reverse(Hutchinson(sde, probes=4), score). The estimate is unbiased; with
    a = G G^T its variance in component i is sum_{j<k} (d_j a_ik + d_k a_ij)^2 / probes, which is
    zero, the estimate exact, for elementwise noise whose g_i looks at x_i alone.

    process: the forward SDE. probes: how many. seed: of the signs, a whole number; they are a
    function of (seed, sample, component), the same at every x and t, so that drifts stay smooth, as
    adaptive solvers want them.
    Source: Hutchinson (1990), section 2.
    """

    probes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.process, SDE) or self.process.direction <= 0:
            raise ArgumentError(f"process={self.process!r} must be a forward SDE, such as GBM()")
        if self.process.additive:
            raise ArgumentError(
                f"process={self.process!r} has additive noise, and no divergence to estimate: use "
                "it as it is"
            )
        positive_int("probes", self.probes)
        if whole(self.seed) is None:
            raise ArgumentError(f"seed={self.seed!r} must be a whole number")

    def divergence(self, x: Tensor, t: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for k in range(self.probes):
            v = self._signs(k, x.shape).to(dtype=x.dtype, device=x.device)
            total = total + self._along(x, t, v)
        return total / self.probes

    def _signs(self, probe: int, shape: torch.Size) -> Tensor:
        # Far from the streams of the noise, with which signs in step would bias the paths.
        mixed = (self.seed * 0x9E3779B97F4A7C15 + (probe + 1) * 0xD1B54A32D192ED03) % 2**64
        generator = torch.Generator().manual_seed(mixed >> 32)
        return torch.empty(shape, dtype=torch.int8).random_(0, 2, generator=generator) * 2 - 1

    def _along(self, x: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """The derivative of (G G^T)(x) v along v."""

        def product(y: Tensor) -> Tensor:
            return self.process.covariance_product(y, t, v)

        keep = torch.is_grad_enabled() and (x.requires_grad or product(x).requires_grad)
        _, along = linearise(product, x, keep)
        return torch.zeros_like(x) if along is None else along(v)
