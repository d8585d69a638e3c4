"""What a solver is tried on: processes with exact scores, states, and the grids it accepts."""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..backends import TorchDiffEq
from ..errors import GridError, NonFiniteError, PairingError, SolverError
from ..grid import log_snr, uniform
from ..processes import CLD, EDM, OU, VE, VP, Cosine, MatrixOU, RectifiedFlow, SubVP
from ..reverse import ReverseSDE
from ..sample import integrate
from ..sde import GaussianSDE
from ..solver import Solver
from ..system import LinearSystem
from .law import affine
from .problems import GaussianData, MixtureData
from .system import GaussianSystemData, system_law

DOUBLE = torch.float64
ETAS = (0.0, 1.0, 0.5)
Grid = Callable[..., Tensor]


class Ground(ABC):
    """A family of forward SDEs, with data whose scores are exact."""

    sdes: tuple[Any, ...]
    """The first is the main one, on which everything is tried; the others tell laws."""
    kinds: tuple[Any, ...]
    """Those of them that differ most."""
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of one and the same state of 4 samples."""
    nobody: tuple[int, ...]
    """The shape of an empty batch."""
    numbers: tuple[int, ...] = ()
    """The shape of states of one number, where there are such."""

    @abstractmethod
    def gaussian(self, sde: Any) -> Any:
        """Gaussian data, from narrow to wide, off centre, none of it special."""

    @abstractmethod
    def one_point(self, sde: Any) -> Any:
        """Data that are one point."""

    @abstractmethod
    def curved(self) -> Any:
        """A score that is not linear, on the main SDE."""

    @abstractmethod
    def start(self, n: int) -> Tensor:
        """n states for it, each of its own."""

    @abstractmethod
    def grids(self, sde: Any) -> Iterator[Grid]:
        """From the noise where a solver can start there, then from a little inside, then even."""

    @abstractmethod
    def errors(self, process: ReverseSDE, ts: Tensor, solver: Solver) -> tuple[float, float]:
        """(of the law, of the path), exactly, where the process has Gaussian data.

        The law: a mean in standard deviations, a variance relative. The path: the correlation of
        the two ends, which tells the noise put in; NaN where it is not known.
        """


class Kernels(Ground):
    """The bundled Gaussian SDEs."""

    sdes = (VP(), SubVP(), VE(), Cosine(), EDM(), RectifiedFlow(), OU())
    kinds = (VP(), SubVP(), VE(), RectifiedFlow())
    shapes = ((4, 6), (4, 2, 3), (4, 1, 2, 3), (4, 6, 1))
    nobody, numbers = (0, 3), (4,)

    def gaussian(self, sde: GaussianSDE) -> GaussianData:
        mean = torch.tensor([0.5, -1.0, 0.2, 1.0, -0.3], dtype=DOUBLE)
        return GaussianData(sde, mean, torch.tensor([0.02, 0.1, 0.4, 1.5, 6.0], dtype=DOUBLE))

    def one_point(self, sde: GaussianSDE) -> GaussianData:
        return GaussianData(sde, torch.tensor([0.7], dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE))

    def curved(self) -> MixtureData:
        return MixtureData.five(VP())

    def start(self, n: int) -> Tensor:
        return VP().prior(torch.linspace(-2, 2, 2 * n, dtype=DOUBLE).reshape(n, 2))

    def grids(self, sde: GaussianSDE) -> Iterator[Grid]:
        low = float(sde.time_of_log_snr(torch.tensor(6.0)))
        yield partial(log_snr, t_min=low)
        yield partial(log_snr, t_min=low, t_max=0.98 * sde.T)
        yield partial(uniform, t_min=0.02 * sde.T, t_max=0.6 * sde.T)

    def errors(self, process: ReverseSDE, ts: Tensor, solver: Solver) -> tuple[float, float]:
        data, eta = process.score, process.eta
        run = affine(process, ts, solver, len(data.mean))
        (m_t, v_t), (m_s, v_s) = data.law(ts[0]), data.law(ts[-1])
        mean, variance = run.offset + run.gain * m_t, run.gain**2 * v_t + run.noise
        law = torch.maximum((mean - m_s).abs() / v_s.sqrt(), (variance / v_s - 1).abs())
        half = process.gaussian.log_snr(ts[[0, -1]]) / 2
        if eta and not bool(half.isfinite().all()):
            return _largest(law), math.nan
        # Whitened, the process is an Ornstein-Uhlenbeck process in lambda.
        first, last = (u - torch.log1p(data.variance * (2 * u).exp()) / 2 for u in half)
        kept = torch.exp(-(eta**2) * (last - first).abs()) if eta else torch.ones_like(v_s)
        return _largest(law), _largest((run.gain * (v_t / v_s).sqrt() - kept).abs())


class Systems(Ground):
    """Linear systems, for the solvers that need one."""

    sdes = kinds = (CLD(), MatrixOU(center=(0.3, -1.0)))
    shapes = ((4, 2, 6), (4, 2, 2, 3), (4, 2, 1, 2, 3), (4, 2, 6, 1))
    nobody = (0, 2, 3)

    def gaussian(self, sde: LinearSystem) -> GaussianSystemData:
        return self._data(sde, 0.5)

    def one_point(self, sde: LinearSystem) -> GaussianSystemData:
        return self._data(sde, 0.0)

    def _data(self, sde: LinearSystem, variance: float) -> GaussianSystemData:
        spread = variance * torch.eye(2, dtype=DOUBLE)
        if sde.start() is not None:  # the second component is at rest
            spread[1, 1] = 0.0
        return GaussianSystemData(sde, torch.tensor([0.7, 0.0], dtype=DOUBLE), spread)

    def curved(self) -> Any:
        data = self.gaussian(CLD())
        return lambda x, t: data(x, t) + 0.3 * torch.sin(2 * x)

    def start(self, n: int) -> Tensor:
        return CLD().prior(torch.linspace(-2, 2, 6 * n, dtype=DOUBLE).reshape(n, 2, 3))

    def grids(self, sde: LinearSystem) -> Iterator[Grid]:
        yield partial(uniform, t_min=0.1 * sde.T, t_max=0.5 * sde.T)

    def errors(self, process: ReverseSDE, ts: Tensor, solver: Solver) -> tuple[float, float]:
        data = process.score
        mean, covariance = system_law(process, ts, solver, *data.law(ts[0]))
        true_mean, true_covariance = data.law(ts[-1])
        std = true_covariance.diagonal().sqrt()
        off = (covariance - true_covariance).abs() / (std * std[:, None])
        return max(_largest((mean - true_mean).abs() / std), _largest(off)), math.nan


KERNELS, SYSTEMS = Kernels(), Systems()


def _largest(errors: Tensor) -> float:
    return float(errors.nan_to_num(nan=math.inf).max())


class Subject:
    """A solver under trial: its ground, the etas that it accepts, and its grids."""

    def __init__(self, solver: Solver) -> None:
        self.solver = solver
        grounds: tuple[Ground, ...] = (KERNELS, SYSTEMS)
        self.accepted = {ground: _accepted(solver, ground) for ground in grounds}
        self.ground = next((ground for ground in grounds if self.accepted[ground]), KERNELS)
        self.etas = [e for e in self.accepted[self.ground] if self.declared(e) is not None]
        self._grids: dict[Any, Grid] = {}
        self._brisk = solver
        if solver.adaptive and dataclasses.is_dataclass(solver) and hasattr(solver, "rtol"):
            self._brisk = dataclasses.replace(solver, rtol=1e-2, atol=1e-2)
        self.least = self._enough() if self.etas else 1

    def declared(self, eta: float) -> float | None:
        """The order that the solver claims at this eta: 0 for none at all."""
        solver = self.solver
        if eta:
            return solver.weak_order
        if not solver.stochastic:
            return solver.order
        return solver.weak_order if solver.order is None else min(2, solver.order)

    def at(self, eta: float) -> Solver:
        """The solver; for SDEs an adaptive one at loose tolerances, for it is slow there."""
        return self._brisk if eta else self.solver

    @property
    def flows(self) -> bool:
        """Whether it follows the probability flow: no noise of its own, and it takes eta = 0."""
        return 0.0 in self.etas and not self.solver.stochastic

    def process(self, eta: float, score: Any = None, sde: Any = None) -> ReverseSDE:
        """A process for it: that of the curved score, unless others are given."""
        return ReverseSDE(sde or self.ground.sdes[0], score or self.ground.curved(), eta)

    def times(self, n: int, eta: float, sde: Any = None) -> Tensor:
        """n steps, or the least that it can do with, of the first grid that it accepts."""
        sde = sde or self.ground.sdes[0]
        return self.grid(eta, sde)(sde, max(n, self.least))

    def grid(self, eta: float, sde: Any) -> Grid:
        """The first grid that it accepts."""
        if (sde, eta) not in self._grids:
            self._grids[sde, eta] = self._chosen(sde, eta)
        return self._grids[sde, eta]

    def _enough(self) -> int:
        """Steps without which it gives up: of implicit methods, whose iteration must converge."""
        self.least = 1
        if self.solver.adaptive:
            return 1
        for least in (1, 40, 120):
            try:
                self.run(self.etas[0], max(4, least))
            except SolverError:
                continue
            except Exception:
                break  # the checks will tell
            return 3 * least if least > 1 else 1  # with some to spare
        return 1

    def _chosen(self, sde: Any, eta: float) -> Grid:
        data = self.ground.gaussian(sde)
        width = self.ground.nobody[1:] if self.ground is SYSTEMS else data.mean.shape
        *others, last = self.ground.grids(sde)
        for grid in others:
            ts, x = grid(sde, 3), torch.ones(1, *width, dtype=DOUBLE)
            try:
                integrate(ReverseSDE(sde, data, eta), x, ts, self.at(eta), seed=0)
            except (GridError, NonFiniteError, SolverError):
                continue
            return grid
        return last

    def run(self, eta: float, n: int = 8, x: Tensor | None = None, **options: Any) -> Tensor:
        """A short run on the curved score."""
        x = self.ground.start(8) if x is None else x
        score = options.pop("score", None)
        options = {"seed": 3} | options
        return integrate(self.process(eta, score), x, self.times(n, eta), self.solver, **options).x

    def errors(self, sde: Any, eta: float, n: int, ts: Tensor | None = None) -> tuple[float, float]:
        """The errors of law and path on Gaussian data."""
        ts = self.times(n, eta, sde) if ts is None else ts
        process = ReverseSDE(sde, self.ground.gaussian(sde), eta)
        return self.ground.errors(process, ts, self.solver)


def _accepted(solver: Solver, ground: Ground) -> list[float]:
    """The etas that the solver does not refuse on the main process of a ground."""
    taken = []
    for eta in ETAS:
        try:
            solver.check(ReverseSDE(ground.sdes[0], ground.curved(), eta))
        except PairingError:
            continue
        taken.append(eta)
    return taken


@functools.cache
def reference(ground: Ground, first: float, last: float) -> tuple[Tensor, Tensor]:
    """64 states at the time `first`, and where the flow of the curved score takes them."""
    flow = ReverseSDE(ground.sdes[0], ground.curved(), 0.0)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(ground.start(64).shape, dtype=DOUBLE, generator=generator)
    ends = torch.tensor([first, last], dtype=DOUBLE)
    x = ground.sdes[0].prior(z, ends[0])
    return x, integrate(flow, x, ends, TorchDiffEq("dopri8", 1e-12, 1e-12)).x
