"""Guidance at some noise levels only.

Source: Kynkaanniemi et al. (2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdeflow.errors import ArgumentError, PairingError, ShapeError
from sdeflow.sde import GaussianSDE, as_time

from .pair import Denoised


@dataclass(frozen=True, eq=False)
class Within:
    """One model in an interval of noise levels, another outside it: `denoise`, and the score.

    inside, outside: two Denoisers of one SDE, such as the guided and the conditional one.
    low, high: the levels low < sigma/alpha <= high, which are those of EDM whatever the SDE; inf
        for no bound above.

    A grid's times are known on the host, so each evaluation is of the one model that is due, and
    nothing waits for the device. Where each sample has a time of its own, t (B,), as in `Adaptive`,
    both are evaluated. Source: Kynkaanniemi et al. (2024).
    """

    inside: Any
    outside: Any
    low: float
    high: float = math.inf

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise ArgumentError(
                f"interval=[{self.low!r}, {self.high!r}] must be two noise levels sigma/alpha, "
                "0 <= low < high, such as [0.2, 2]"
            )
        for name, model in (("inside", self.inside), ("outside", self.outside)):
            if not callable(getattr(model, "denoise", None)):
                raise ArgumentError(f"{name}={model!r} must be a Denoiser")
        if self.inside.sde != self.outside.sde:
            raise PairingError("inside and outside must be Denoisers of one and the same SDE")

    @property
    def sde(self) -> GaussianSDE:
        """The SDE of both."""
        return self.inside.sde

    def active(self, t: Tensor) -> Tensor:
        """Whether t lies in the interval, of the shape of t."""
        t = as_time(t)
        level = self.sde.sigma(t) / self.sde.alpha(t)
        if level.shape != t.shape:
            raise ShapeError(
                f"{type(self.sde).__name__} has elementwise schedules, and so no single noise "
                "level: an interval of guidance needs one"
            )
        return (self.low < level) & (level <= self.high)

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t = x] of the model that is due at t."""
        active = self.active(t)
        if not active.ndim:
            return (self.inside if active else self.outside).denoise(x, t)
        due = active.to(x.device).reshape(-1, *[1] * (x.ndim - 1))
        return torch.where(due, self.inside.denoise(x, t), self.outside.denoise(x, t))

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The score, (alpha D - x)/sigma^2."""
        return Denoised(self.sde, self.denoise)(x, t)
