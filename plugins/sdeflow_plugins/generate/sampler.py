"""Samplers by name: a solver, the eta of its process and a grid, as a command line gives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdeflow.errors import PairingError
from sdeflow.reverse import ReverseSDE
from sdeflow.sample import Solution, sample
from sdeflow.solver import Solver

from ..build import build


@dataclass(frozen=True)
class Sampler:
    """A solver by name with its options, the eta of its process, and its grid.

    eta: None for 0 where the solver runs the probability flow, else 1.
    """

    solver: str = "dpmpp_2m"
    options: dict[str, Any] = field(default_factory=dict)
    eta: float | None = None
    grid: str = "log_snr"
    grid_options: dict[str, Any] = field(default_factory=dict)

    def process(self, denoiser: Any) -> ReverseSDE:
        """The process that this sampler runs, of a Denoiser, or of what is guided as one."""
        if self.eta is not None:
            return ReverseSDE(denoiser.sde, denoiser, self.eta)
        flow = ReverseSDE(denoiser.sde, denoiser, 0.0)
        try:
            self.make_solver().check(flow)
        except PairingError:
            return ReverseSDE(denoiser.sde, denoiser, 1.0)
        return flow

    def make_solver(self) -> Solver:
        """The solver."""
        return build("solver", self.solver, self.options)

    def make_grid(self) -> Callable[..., Tensor]:
        """The grid, a function (sde, n) to times."""
        return build("grid", self.grid, self.grid_options)

    def settings(self, steps: int) -> dict[str, Any]:
        """The solver, the grid and the steps, as `sample` and its like take them."""
        return {"solver": self.make_solver(), "grid": self.make_grid(), "steps": steps}

    def run(
        self,
        denoiser: Any,
        shape: Sequence[int],
        steps: int,
        seed: int | Sequence[int] = 0,
        device: torch.device | str = "cpu",
        progress: bool = False,
        keep: bool = False,
    ) -> Solution:
        """A batch of samples of that shape (B, *). keep: with the states at all times."""
        return sample(
            self.process(denoiser),
            shape,
            **self.settings(steps),
            seed=seed,
            device=device,
            progress=progress,
            keep=keep,
        )


SAMPLERS: dict[str, Sampler] = {
    # label                    solver, its process by eta: 0 the flow, 1 the reverse SDE; its grid
    "DDPM": Sampler("ddpm", eta=1.0, grid="uniform"),
    "DDIM": Sampler("ddim", eta=0.0),
    "DPM++2M": Sampler("dpmpp_2m", eta=0.0),
    "Euler-Maruyama": Sampler("euler_maruyama", eta=1.0, grid="uniform"),
    "dopri5\n(torchdiffeq)": Sampler("torchdiffeq", {"method": "dopri5"}, eta=0.0),
    "SRK\n(torchsde)": Sampler("torchsde", {"method": "srk"}, eta=1.0),
}
