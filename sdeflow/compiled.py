"""Steps compiled by torch.compile, fifty in one graph: for small states, where Python costs most.

The noise is drawn outside the graph from the same source, so that a seed means the same path as in
a run that is not compiled, up to rounding.
"""

from __future__ import annotations

import itertools
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from .errors import PairingError, SdeflowError, SolverError
from .noise import Noise, SeededNoise, area
from .sde import SDE
from .solver import Solver, StepSolver

STEPS, NUMBERS = 50, 1 << 18
"""A graph takes 50 steps, or fewer of a large state: its normals are held all at once. What remains
of a grid is run as it would be without compilation."""

_LOCK = Lock()
_GRAPHS: OrderedDict[Hashable, Graph] = OrderedDict()


@dataclass(frozen=True)
class Graph:
    """The compiled steps of one solver on one process: what they evaluate and draw, and they."""

    evaluations: int
    draws: tuple[str, ...]
    run: Callable[..., Tensor]
    process: SDE


def finish(
    solver: Solver,
    process: SDE,
    counted: SDE,
    calls: list[int],
    x: Tensor,
    ts: Tensor,
    noise: Noise,
    final: list[Tensor],
) -> Iterator[Tensor]:
    """Yield once a step, of which all but the last few are compiled; the last state goes into
    `final`.

    counted: the process that counts its evaluations in calls[0], as the graph does not.
    """
    first, times = 0, ts
    steps = max(1, min(STEPS, NUMBERS // max(1, x.numel())))
    if len(ts) > steps:
        graph = _graph(solver, process, counted, calls, x, ts)
        x = x.contiguous()
        chunks = _chunks(graph.draws, ts, noise, steps)
        for first in range(steps, len(ts), steps):
            times = ts[first - steps : first + 1].clone()
            x = _called(graph.run, solver, process, x, times, next(chunks))
            calls[0] += graph.evaluations * steps
            yield from itertools.repeat(times[-1], steps)
    if first < len(ts) - 1:
        yield from solver.finish(counted, x, ts[first:], noise, final)
    else:
        final.append(x)


def _steps(solver: StepSolver, process: SDE, x: Tensor, ts: Tensor, z: Tensor | None) -> Tensor:
    """What is compiled: the solver's own steps, on the normals given."""
    times = ts.unbind(0)
    noise = _Given(() if z is None else z.unbind(0))
    for t, s in zip(times[:-1], times[1:], strict=True):
        x, _ = solver.step(process, x, t, s, noise, None)
    return x


class _Given:
    """A source that hands out what has been drawn before."""

    def __init__(self, z: tuple[Tensor, ...]) -> None:
        self.z, self.k = z, 0

    def __call__(self, t: Tensor, s: Tensor) -> Tensor:
        self.k += 1
        return self.z[self.k - 1]

    def area(self, t: Tensor, s: Tensor) -> Tensor:
        return self(t, s)


class _Probe:
    """A source that records what is asked of it: normals, or areas, of the step [t, s] or not."""

    def __init__(self, shape: torch.Size, x: Tensor) -> None:
        self.source = SeededNoise(0, shape, x.dtype, x.device)
        self.asked: list[tuple[str, Tensor, Tensor]] = []

    def __call__(self, t: Tensor, s: Tensor) -> Tensor:
        self.asked.append(("normals", t, s))
        return self.source(t, s)

    def area(self, t: Tensor, s: Tensor) -> Tensor:
        self.asked.append(("area", t, s))
        return self.source(t, s)


def _graph(
    solver: Solver, process: SDE, counted: SDE, calls: list[int], x: Tensor, ts: Tensor
) -> Graph:
    """The graph for this solver, process and shape: the one made before, if there was one."""
    key: Hashable = (solver, process, x.shape, x.dtype, x.device)
    try:
        hash(key)
    except TypeError:  # a process that compares by value and may change: known by identity
        key = (repr(solver), id(process), x.shape, x.dtype, x.device)
    with _LOCK:
        if key in _GRAPHS:
            _GRAPHS.move_to_end(key)
            if isinstance(solver, StepSolver):
                solver.init(process, x, ts)  # it may check the state
            return _GRAPHS[key]
    graph = _probed(solver, process, counted, calls, x, ts)
    with _LOCK:
        _GRAPHS[key] = graph
        if len(_GRAPHS) > 16:
            _GRAPHS.popitem(last=False)
    return graph


def _probed(
    solver: Solver, process: SDE, counted: SDE, calls: list[int], x: Tensor, ts: Tensor
) -> Graph:
    """Take one step in Python, to see what it evaluates and draws; a PairingError if it cannot be
    compiled."""
    name = type(solver).__name__
    if not isinstance(solver, StepSolver):
        raise PairingError(
            f"compile=True: {name} has no step of its own to compile; use one that has, such as "
            "EulerMaruyama()"
        )
    shape = x.shape if counted.deterministic else counted.noise_shape(x)
    before, probe, t, s = calls[0], _Probe(shape, x), ts[0], ts[1]
    memory = solver.init(counted, x, ts)
    if memory is None:
        _, memory = solver.step(counted, x, t, s, probe, memory)
    if memory is not None or any(u is not t or v is not s for _, u, v in probe.asked):
        raise PairingError(
            f"compile=True: {name} remembers earlier steps, or divides the noise of one; only "
            "one-step solvers that draw for the whole step are compiled, such as EulerMaruyama()"
        )
    evaluations, calls[0] = calls[0] - before, before
    # A code object of its own: torch counts recompilations, and forgets, by code object.
    steps = types.FunctionType(_steps.__code__.replace(), _steps.__globals__, _steps.__name__)
    # Calling a kernel from Python costs more than a small one does: on the host it is done in C++.
    options: dict[str, Any] | None = {"cpp_wrapper": True} if x.device.type == "cpu" else None
    run = torch.compile(steps, fullgraph=True, dynamic=False, options=options)
    return Graph(evaluations, tuple(kind for kind, *_ in probe.asked), run, process)


def _called(run: Callable[..., Tensor], solver: Solver, *args: Any) -> Tensor:
    try:
        return run(solver, *args)
    except SdeflowError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        raise SolverError(
            f"compile=True: torch.compile could not make one graph of the steps of "
            f"{type(solver).__name__} on this process ({type(error).__name__}: {reason[0]}); it "
            "needs a C++ compiler, and a drift and diffusion of tensor operations alone, without "
            "branches on values; or leave out compile=True"
        ) from error


def _chunks(
    draws: tuple[str, ...], ts: Tensor, noise: Noise, steps: int
) -> Iterator[Tensor | None]:
    """The normals of so many steps at a time, (steps * draws, ...); None where there are none."""
    if draws and isinstance(noise, SeededNoise):
        yield from noise.chunks(steps * len(draws))
    for first in range(0, len(ts) - steps, steps):
        times = ts[first : first + steps + 1].unbind(0)
        drawn = [
            noise(t, s) if kind == "normals" else area(noise, t, s)
            for t, s in zip(times, times[1:], strict=False)
            for kind in draws
        ]
        yield torch.stack(drawn) if drawn else None
