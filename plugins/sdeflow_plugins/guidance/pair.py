"""Guidance by a second model: away from it, and what makes a score of what denoises.

Source: Karras et al. (2024, Autoguidance).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from sdeflow.denoiser import Denoiser
from sdeflow.errors import ArgumentError, PairingError
from sdeflow.reverse import Score
from sdeflow.sde import GaussianSDE, as_time

from .arguments import Weight, between, check_weight


@dataclass(frozen=True, eq=False)
class Between:
    """(x, t) -> weak + w (good - weak), for two networks of one parametrisation, or two scores."""

    good: Score
    weak: Score
    w: Weight

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return between(self.weak(x, t), self.good(x, t), self.w)


@dataclass(frozen=True, eq=False)
class Denoised:
    """A score by way of what denoises: s = (alpha D - x)/sigma^2 of the D(x, t) given."""

    sde: GaussianSDE
    denoise: Score

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        t = as_time(t)
        a, s = self.sde.kernel(x, t)
        return (a * self.denoise(x, t) - x) / s**2


def guide(good: Any, weak: Any, w: Weight, *, convention: str = "scale") -> Any:
    """The model `good` led away from a weaker one, D_weak + w (D - D_weak).

    good, weak: two Denoisers of one SDE, of any networks and parametrisations; or two scores.
    With a smaller or earlier network as `weak` it is autoguidance; with the unconditional model it
    is classifier-free guidance in two calls. w, convention: as for `cfg`.

    Each evaluation is one call of each, and counts once in `nfe`. Two Denoisers of one
    parametrisation make a Denoiser. Source: Karras et al. (2024, Autoguidance).
    """
    w = check_weight(w, convention)
    if not all(callable(getattr(model, "denoise", None)) for model in (good, weak)):
        for name, model in (("good", good), ("weak", weak)):
            if not callable(model):
                raise ArgumentError(f"{name}={model!r} must be a Denoiser or a score (x, t)")
        return Between(good, weak, w)
    if good.sde != weak.sde:
        raise PairingError(
            f"good was trained for {good.sde!r}, weak for {weak.sde!r}; guidance takes their "
            "difference at one x and t: give both the same SDE"
        )
    if (
        type(good) is type(weak) is Denoiser
        and good.prediction == weak.prediction
        and (good.prediction != "edm" or good.sigma_data == weak.sigma_data)
    ):
        return replace(good, net=Between(good.net, weak.net, w))
    return Denoised(good.sde, Between(good.denoise, weak.denoise, w))
