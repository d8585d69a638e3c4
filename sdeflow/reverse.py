"""The reverse-time SDE and the probability-flow ODE of any forward SDE, from its score.

    dx = [f - (1 + eta^2)/2 (div(G G^T) + G G^T s)] dt + eta G dw,      run from T down

eta = 1 is the reverse-time SDE, eta = 0 the probability-flow ODE; every eta in between has the
same marginals p_t. The divergence matters where the noise depends on the state. f is the Ito drift,
whichever calculus the forward SDE declares, and the process is meant in the Ito sense.
Source: Anderson (1982); Haussmann & Pardoux (1986); Song et al. (2021, Score-SDE), appendix A, D.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .calculus import ito_drift
from .errors import ArgumentError, PairingError
from .sde import SDE, GaussianSDE, as_time, match

Score = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ReverseSDE(SDE):
    """The eta-family of processes that undo `forward`, given its score.

    forward: the SDE to undo.
    score: any callable (x, t) -> grad log p_t(x); one that also has `denoise(x, t)`, as a Denoiser
        does, is asked for E[x_0 | x_t] directly.
    eta: in [0, 1]; scales the standard deviation of the noise.
    """

    forward: SDE
    score: Any
    eta: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.forward, SDE) or isinstance(self.forward, ReverseSDE):
            raise ArgumentError(f"sde={self.forward!r} must be a forward SDE, such as VP()")
        if not callable(self.score) and not self.denoises:
            raise ArgumentError(f"score={self.score!r} must be callable as score(x, t)")
        if not callable(self.score) and not isinstance(self.forward, GaussianSDE):
            raise ArgumentError(
                f"score={self.score!r} only denoises, and {type(self.forward).__name__} has no "
                "Gaussian kernel to read a score from; give score(x, t)"
            )
        check_eta(self.eta)
        trained = getattr(self.score, "sde", self.forward)
        if isinstance(trained, GaussianSDE) and trained != self.forward:
            raise PairingError(
                f"the denoiser was made for {trained!r}, the process runs {self.forward!r}; "
                "give both the same SDE"
            )

    @property
    def T(self) -> float:  # type: ignore[override]
        """The last time of the forward SDE, where this process begins."""
        return self.forward.T

    @property
    def noise(self) -> str:  # type: ignore[override]
        """The kind of noise of the forward SDE."""
        return self.forward.noise

    @property
    def additive(self) -> bool:  # type: ignore[override]
        """Whether g is known not to depend on x."""
        return self.forward.additive

    @property
    def commutative(self) -> bool:  # type: ignore[override]
        """Whether matrix noise is known to commute."""
        return self.forward.commutative

    @property
    def direction(self) -> int:  # type: ignore[override]
        """-1: down in time; 0, either way, for the ODE."""
        return -1 if self.eta else 0

    @property
    def denoises(self) -> bool:
        """Whether the score offers E[x_0 | x_t] directly."""
        return callable(getattr(self.score, "denoise", None))

    def with_score(self, score: Score | Any) -> ReverseSDE:
        """The same process with another score."""
        return replace(self, score=score)

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """The coefficient of dt, signed for decreasing t.

        From a denoiser on a Gaussian SDE it is alpha' D + (sigma' + eta^2 g^2/(2 sigma)) eps with
        eps = (x - alpha D)/sigma, which stays finite where alpha = 0 and eta = 0.
        """
        t = as_time(t)
        forward, weight = self.forward, (1 + self.eta**2) / 2
        if self.denoises and isinstance(forward, GaussianSDE):
            a, s = forward.kernel(x, t)
            slope_a, slope_s = (match(slope, x, t) for slope in forward.slopes(t))
            if self.eta:
                slope_s = slope_s + self.eta**2 * match(forward.rates(t)[1], x, t) / (2 * s)
            data = self.denoise(x, t)
            return slope_a * data + slope_s * ((x - a * data) / s)
        pull = forward.covariance_product(x, t, self.score(x, t))
        if not forward.additive:
            pull = pull + forward.divergence(x, t)
        return ito_drift(forward, x, t) - weight * pull

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        """eta g(x, t)."""
        return self.eta * self.forward.diffusion(x, as_time(t))

    def noise_shape(self, x: Tensor) -> torch.Size:
        """That of the forward SDE."""
        return self.forward.noise_shape(x)

    def spread(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """eta G(x, t) z."""
        return self.eta * self.forward.spread(x, as_time(t), z)

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t = x]: the denoiser's own, or Tweedie's (x + sigma^2 score)/alpha."""
        t = as_time(t)
        if self.denoises:
            return self.score.denoise(x, t)
        a, s = self.gaussian.kernel(x, t)
        return (x + s**2 * self.score(x, t)) / a

    @property
    def gaussian(self) -> GaussianSDE:
        """The forward SDE, known to have a Gaussian kernel."""
        if not isinstance(self.forward, GaussianSDE):
            raise PairingError(f"{type(self.forward).__name__} has no Gaussian kernel alpha, sigma")
        return self.forward

    def divergence(self, x: Tensor, t: Tensor) -> Tensor:
        """eta^2 div(G G^T)."""
        return self.eta**2 * self.forward.divergence(x, t)


def check_eta(eta: float) -> None:
    """Refuse an eta that is no number in [0, 1]."""
    if isinstance(eta, bool) or not isinstance(eta, Real) or not 0 <= eta <= 1:
        raise ArgumentError(f"eta={eta!r} must be in [0, 1]: 0 is the ODE, 1 the full SDE")


def reverse(sde: SDE, score: Score | Any, eta: float = 1.0) -> ReverseSDE:
    """The reverse-time SDE of `sde`: noise to data, with the marginals of the forward one.

    sde: the forward SDE; score: (x, t) -> grad log p_t(x), or a Denoiser; eta in [0, 1] scales the
    noise, 1 being Anderson's reverse-time SDE.
    """
    return ReverseSDE(sde, score, eta)


def probability_flow(sde: SDE, score: Score | Any) -> ReverseSDE:
    """The probability-flow ODE of `sde`: deterministic, invertible, the same marginals."""
    return ReverseSDE(sde, score, 0.0)


def tweedie(sde: GaussianSDE, score: Score, x: Tensor, t: Tensor | float) -> Tensor:
    """E[x_0 | x_t = x] = (x + sigma_t^2 score(x, t)) / alpha_t. Source: Efron (2011)."""
    return ReverseSDE(sde, score, 0.0).denoise(x, as_time(t))
