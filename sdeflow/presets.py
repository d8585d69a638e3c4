"""Presets: a process, a solver, a grid and a number of steps under the name they are known by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import positive_int
from .noise import Seed
from .plugins import get
from .reverse import ReverseSDE, check_eta
from .sample import Solution, sample
from .sde import GaussianSDE


@dataclass(frozen=True)
class Preset:
    """A sampler of the literature: eta, solver, grid and steps.

    eta: of the process; 0 is the probability flow. solver, grid: registered names, with options.
    evaluations: of the network that a run costs. source: where the setting comes from.
    """

    eta: float
    solver: str
    grid: str
    steps: int
    evaluations: int
    solver_options: Mapping[str, Any] = field(default_factory=dict)
    grid_options: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        check_eta(self.eta)
        positive_int("steps", self.steps)
        positive_int("evaluations", self.evaluations)

    def process(self, sde: GaussianSDE, score: Any) -> ReverseSDE:
        """The process that it runs, for a score or a denoiser."""
        return ReverseSDE(sde, score, self.eta)

    def sample(
        self,
        sde: GaussianSDE,
        score: Any,
        shape: Sequence[int],
        *,
        seed: Seed | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        keep: bool = False,
        progress: bool = False,
    ) -> Solution:
        """Samples of `shape` from noise; the other arguments are those of `sdeflow.sample`."""
        return sample(
            self.process(sde, score),
            shape,
            solver=get("solver", self.solver, **self.solver_options),
            grid=get("grid", self.grid, **self.grid_options),
            steps=self.steps,
            seed=seed,
            dtype=dtype,
            device=device,
            keep=keep,
            progress=progress,
        )
