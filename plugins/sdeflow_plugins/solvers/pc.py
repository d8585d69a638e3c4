"""Predictor-corrector sampling: a solver's step, then Langevin steps at the new time.

    x <- x + e score(x, s) + sqrt(2 e) z

Source: Song et al. (2021, Score-SDE), appendix G, algorithms 2 to 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdeflow.errors import ArgumentError, one_of, positive_int
from sdeflow.noise import Noise
from sdeflow.plugins import hookimpl
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import SDE
from sdeflow.solver import Memory, StepSolver

from .ddim import DDIM


@dataclass(frozen=True)
class PredictorCorrector(StepSolver):
    """A predictor and Langevin correctors.

    predictor: the solver of the step. corrections: Langevin steps after it. snr: r.
    norm: "sample", e = 2 a^2 (r |z|/|score|)^2 with the norms of each sample by itself; (the
        usual code takes their means over the batch, so that a sample depends on its batch), and
        |z|/|score| at most 2 sigma, so that a score near zero does not throw a sample far off;
        "sigma", annealed Langevin dynamics, e = 2 a^2 (r sigma)^2, which is linear and fused.
        a = alpha_t/alpha_s, about 1.
    The steps of fixed r keep a bias of order r^2 however fine the grid: weak order 0.
    No correction is made at sigma = 0.
    """

    predictor: StepSolver = field(default_factory=DDIM)
    corrections: int = 1
    snr: float = 0.16
    norm: str = "sample"

    weak_order = 0
    stochastic = True
    needs = ("gaussian", "one alpha")

    def __post_init__(self) -> None:
        if not isinstance(self.predictor, StepSolver):
            raise ArgumentError(f"predictor={self.predictor!r} must be a solver with a step")
        positive_int("corrections", self.corrections)
        one_of("norm", self.norm, ("sample", "sigma"))
        if not 0 < self.snr < math.inf:
            raise ArgumentError(f"snr={self.snr!r} must be > 0, such as 0.16")

    @property
    def evaluations(self) -> float:  # type: ignore[override]
        """The predictor's and one a correction."""
        return self.predictor.evaluations + self.corrections

    def check(self, process: SDE) -> None:
        super().check(process)
        self.predictor.check(process)

    def init(self, process: ReverseSDE, x: Tensor, ts: Tensor) -> Memory:
        return self.predictor.init(process, x, ts)

    def step(
        self, process: ReverseSDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        x, memory = self.predictor.step(process, x, t, s, noise, memory)
        sde = process.gaussian
        (a_t, _), (a_s, s_s) = sde.kernel(x, t), sde.kernel(x, s)
        if not bool(s_s > 0):
            return x, memory
        scale = torch.where(a_t > 0, a_t / a_s, 1.0)
        for _ in range(self.corrections):
            score = (a_s * process.denoise(x, s) - x) / s_s**2
            z = noise(t, s)
            size: Any = (scale * self.snr * s_s) ** 2
            if self.norm == "sample":
                ratio = torch.minimum(
                    _norm(z) / _norm(score).clamp_min(torch.finfo(x.dtype).tiny), 2 * s_s.to(x)
                )
                size = (scale * self.snr * ratio) ** 2
            x = x + 2 * size * score + 2 * size**0.5 * z
        return x, memory


def _norm(x: Tensor) -> Tensor:
    """The norm of each sample, ready to multiply it."""
    flat = x.reshape(len(x), math.prod(x.shape[1:]))
    return torch.linalg.vector_norm(flat, dim=1).reshape(-1, *[1] * (x.ndim - 1))


@hookimpl
def sdeflow_solvers() -> dict[str, Callable[..., Any]]:
    return {"predictor_corrector": PredictorCorrector}
