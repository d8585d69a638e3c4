"""The tableau of a linear solver: traced from `step` once, run as fused updates.

Almost every diffusion sampler computes x_s = a x + sum_j b_j F_j + c z with numbers that depend on
the grid alone. Running `step` on symbols (the state is e_0, the k-th network output the next unit
vector, each noise another) brings those numbers out: the tableau, as a Butcher table is for
Runge-Kutta. A step that does anything else with its symbols is not linear and keeps its plain loop.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .denoiser import Denoiser
from .errors import GridError, SdeflowError
from .reverse import ReverseSDE
from .sde import SDE, GaussianSDE
from .solver import StepSolver
from .symbol import NotLinear, Symbol

Terms = tuple[tuple[int, float], ...]
"""A linear combination: (register, coefficient) pairs."""


class Evaluation(NamedTuple):
    """Ask the network at a combination of registers; the answer is the next register."""

    terms: Terms
    time: Tensor


class Draw(NamedTuple):
    """Draw unit normals for [t, s], of the increment or of the area; the next register."""

    t: Tensor
    s: Tensor
    area: bool = False


class Row(NamedTuple):
    """One step: operations in their order, then the new state and the new memory."""

    t: Tensor
    s: Tensor
    operations: tuple[Evaluation | Draw, ...]
    state: Terms
    memory: tuple[Terms, ...] = ()


@dataclass(frozen=True, eq=False)
class Tableau:
    """The numbers of one solver, process and grid. Register 0 of a row is the state; then come
    the memory, and the answers of the row's operations, in their order."""

    rows: tuple[Row, ...]
    programs: dict[Any, Any] = field(default_factory=dict)
    """What `fused` keeps for its loop, by dtype."""

    @cached_property
    def times(self) -> tuple[Tensor, ...]:
        """The time of every evaluation of a run, as the network sees it."""
        return tuple(
            op.time for row in self.rows for op in row.operations if isinstance(op, Evaluation)
        )

    @cached_property
    def host_times(self) -> Tensor:
        """The same times as one float64 tensor on the host."""
        return torch.stack(self.times) if self.times else torch.empty(0, dtype=torch.float64)

    @property
    def evaluations(self) -> int:
        """Network evaluations of a whole run."""
        return len(self.times)


# ---- tracing


class _Recorder:
    """Stands in for the network and for the noise while a step is traced."""

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, memory: int) -> None:
        self.frame, self.count = object(), 1 + memory
        self.operations: list[Evaluation | Draw] = []

    def register(self, i: int) -> Symbol:
        return Symbol({i: 1.0}, self.frame)

    def _next(self) -> Symbol:
        self.count += 1
        return self.register(self.count - 1)

    def __call__(self, x: Any, t: Tensor) -> Symbol:
        if not isinstance(x, Symbol) or x.frame is not self.frame:
            raise NotLinear("the score is asked at something that is not this step's state")
        self.operations.append(Evaluation(_terms(x), torch.as_tensor(t, dtype=torch.float64)))
        return self._next()

    def draw(self, t: Tensor, s: Tensor, area: bool = False) -> Symbol:
        self.operations.append(Draw(t, s, area))
        return self._next()


class _RecordingNoise:
    """A recorder with the face of a noise source."""

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder = recorder

    def __call__(self, t: Tensor, s: Tensor) -> Symbol:
        return self._recorder.draw(t, s)

    def area(self, t: Tensor, s: Tensor) -> Symbol:
        return self._recorder.draw(t, s, True)


class _RecordingDenoiser:
    """A recorder with the face of an object that denoises."""

    def __init__(self, recorder: _Recorder) -> None:
        self.denoise = recorder


def _terms(x: Symbol) -> Terms:
    size = max((abs(c) for c in x.terms.values()), default=0.0)
    least = 4e-16 * size if size < math.inf else 0.0  # below it is what sums of numbers leave over
    kept = tuple(sorted((i, c) for i, c in x.terms.items() if not abs(c) <= least))
    return kept or ((0, 0.0),)


def trace(solver: StepSolver, process: SDE, ts: Tensor) -> Tableau | None:
    """The tableau of `solver` on `process` along `ts`; None where the step is not linear.

    Raises a GridError where a coefficient is infinite, before any evaluation.
    """
    if not isinstance(process, ReverseSDE) or not isinstance(process.forward, GaussianSDE):
        return None
    key = _key(solver, process, ts)
    if key is not None:
        with _LOCK:
            if key in _CACHE:
                _CACHE.move_to_end(key)
                return _CACHE[key]
    try:
        tableau = _trace(solver, process, ts)
    except SdeflowError:
        raise
    except Exception:  # NotLinear, or what else a symbol cannot stand: the plain loop will tell
        tableau = None
    if key is not None:
        with _LOCK:
            _CACHE[key] = tableau
            if len(_CACHE) > 64:
                _CACHE.popitem(last=False)
    return tableau


def _trace(solver: StepSolver, process: ReverseSDE, ts: Tensor) -> Tableau:
    recorder = _Recorder()
    score = process.score
    if type(score) is Denoiser:
        process = process.with_score(replace(score, net=recorder))  # type: ignore[arg-type]
    elif process.denoises:
        process = process.with_score(_RecordingDenoiser(recorder))
    else:
        process = process.with_score(recorder)
    noise: Any = _RecordingNoise(recorder)
    rows: list[Row] = []
    memory = solver.init(process, recorder.register(0), ts)  # type: ignore[arg-type]
    for t, s in zip(ts[:-1], ts[1:], strict=True):
        held: list[Symbol] = []
        slots: dict[int, int] = {}
        layout = _map(memory, lambda leaf: _slot(leaf, held, slots))  # noqa: B023
        if rows:
            rows[-1] = rows[-1]._replace(memory=tuple(map(_terms, held)))
        elif held:
            raise NotLinear("init puts a state into the memory")
        recorder.begin(len(held))
        memory = _map(layout, lambda slot: recorder.register(slot.i))
        x: Any
        x, memory = solver.step(process, recorder.register(0), t, s, noise, memory)  # type: ignore[arg-type]
        if not isinstance(x, Symbol) or x.frame is not recorder.frame:
            raise NotLinear("the step returns something that is not this step's state")
        state = _terms(x)
        if state[0][0]:  # a state that is left behind: 0 times it still carries a NaN on
            state = ((0, 0.0), *state)
        rows.append(Row(t, s, tuple(recorder.operations), state))
        _check_finite(rows[-1], solver, process)
    return Tableau(tuple(_normalised(rows)))


def _normalised(rows: list[Row]) -> Iterator[Row]:
    """The same rows with each remembered combination in units of its largest coefficient, which
    saves an operation a step; in half precision no other unit is sure not to overflow."""
    units = {0: 1.0}

    def convert(terms: Terms) -> Terms:
        return tuple((i, c * units.get(i, 1.0)) for i, c in terms)

    for row in rows:
        operations = tuple(
            op._replace(terms=convert(op.terms)) if isinstance(op, Evaluation) else op
            for op in row.operations
        )
        state, memory = convert(row.state), tuple(map(convert, row.memory))
        memory = tuple(tuple(sorted(terms, key=lambda term: -abs(term[1]))) for terms in memory)
        units = {0: 1.0} | {j: terms[0][1] or 1.0 for j, terms in enumerate(memory, 1)}
        memory = tuple(
            tuple((i, c / units[j]) for i, c in terms) for j, terms in enumerate(memory, 1)
        )
        yield Row(row.t, row.s, operations, state, memory)


class _Slot(NamedTuple):
    i: int


def _slot(leaf: Symbol, held: list[Symbol], slots: dict[int, int]) -> _Slot:
    """A place among the registers for a remembered symbol; the same symbol gets one place."""
    if id(leaf) not in slots:
        held.append(leaf)
        slots[id(leaf)] = len(held)
    return _Slot(slots[id(leaf)])


def _map(tree: Any, change: Callable[[Any], Any]) -> Any:
    """`change` applied to the symbols, or slots, in nested tuples, lists and dicts."""
    if isinstance(tree, Symbol | _Slot):
        return change(tree)
    if isinstance(tree, dict):
        return {name: _map(value, change) for name, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_map(value, change) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(_map(value, change) for value in tree)
    return tree


def _check_finite(row: Row, solver: StepSolver, process: ReverseSDE) -> None:
    combinations = [op.terms for op in row.operations if isinstance(op, Evaluation)] + [row.state]
    times = [op.time for op in row.operations if isinstance(op, Evaluation)]
    if all(math.isfinite(c) for terms in combinations for _, c in terms) and all(
        math.isfinite(float(time)) for time in times
    ):
        return
    sde = process.gaussian
    ends = ", ".join(
        f"alpha({float(u):.6g}) = {float(sde.alpha(u)):.3g}, sigma = {float(sde.sigma(u)):.3g}"
        for u in (row.t, row.s)
    )
    raise GridError(
        f"ts: the step of {type(solver).__name__} from t={float(row.t):.6g} to "
        f"s={float(row.s):.6g} has an infinite coefficient ({ends}); keep the grid away from that "
        "end with t_max or t_min, or use a solver or prediction that stays finite there"
    )


# ---- remembering tableaux

_CACHE: OrderedDict[Any, Tableau | None] = OrderedDict()
_LOCK = Lock()


def _key(solver: StepSolver, process: ReverseSDE, ts: Tensor) -> Any:
    """What a tableau depends on, if all of that is plain values; otherwise None: not remembered."""
    score: Any = process.score
    kind: Any
    if type(score) is Denoiser:
        kind = (score.prediction, score.sigma_data)
    else:
        kind = "denoise" if process.denoises else "score"
    parts = (solver, process.forward, process.eta)
    if type(process) is not ReverseSDE or not all(map(_is_value, parts)):
        return None
    return (*parts, kind, ts.numpy().tobytes())


def _is_value(obj: Any) -> bool:
    """Whether equality of such objects means that they compute the same."""
    if obj is None or isinstance(obj, bool | int | float | str):
        return True
    if isinstance(obj, tuple):
        return all(map(_is_value, obj))
    parameters = getattr(type(obj), "__dataclass_params__", None)
    if is_dataclass(obj) and parameters is not None and parameters.frozen and parameters.eq:
        compared = {field.name for field in fields(obj) if field.compare}
        return compared >= vars(obj).keys() and all(
            _is_value(getattr(obj, name)) for name in compared
        )
    return False
