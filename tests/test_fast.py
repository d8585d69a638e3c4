"""The quick roads of simulation have the numbers of the plain loop, and nobody sees a buffer."""

import gc
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.exc import TorchDynamoException

from sdeflow import (
    SDE,
    ArgumentError,
    EulerMaruyama,
    Heun,
    NonFiniteError,
    PairingError,
    SeededNoise,
    ShapeError,
    SolverError,
    TorchSDE,
    compiled,
    integrate,
    trajectory,
)
from sdeflow.noise import _BLOCKS
from sdeflow.solver import StepSolver
from sdeflow.solvers import EulerHeun

TS = torch.linspace(0, 1, 13, dtype=torch.float64) ** 1.5
T, S = TS[0], TS[1]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@dataclass(frozen=True)
class Growth(SDE):
    """Geometric Brownian motion; a field, so that two of them can be equal."""

    mu: float = 0.3
    volatility: float = 0.5

    def drift(self, x, t):
        return self.mu * x

    def diffusion(self, x, t):
        return self.volatility * x


class Returns(SDE):
    """An SDE whose drift and diffusion are functions given."""

    def __init__(self, drift, diffusion, noise="elementwise"):
        self.f, self.g, self.kind = drift, diffusion, noise

    @property
    def noise(self):
        return self.kind

    def drift(self, x, t):
        return self.f(x, t)

    def diffusion(self, x, t):
        return self.g(x, t)


def plain(process, x, ts, seed=3, **options):
    """The loop over `step`, every state new."""
    source = SeededNoise(seed, process.noise_shape(x), x.dtype)
    return [x for _, x in StepSolver.solve(EulerMaruyama(), process, x, ts, source)]


def start(*shape, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=dtype) + 0.5


# ---- the numbers are those of `step`

GS = {
    "g(x)": lambda x, t: 0.4 * x,
    "(B, 1)": lambda x, t: x.reshape(len(x), -1).mean(1).reshape(-1, *[1] * (x.ndim - 1)),
    "a parameter": lambda x, t: torch.nn.Parameter(torch.full_like(x, 0.3)),
    "(1,)": lambda x, t: torch.tensor([0.3], dtype=x.dtype),
    "0-dim": lambda x, t: 1 + t,
    "0-dim of float64": lambda x, t: torch.tensor(0.3, dtype=torch.float64),
    "a number": lambda x, t: 0.3,
    "expanded": lambda x, t: torch.tensor(0.3, dtype=x.dtype).expand(x.shape),
    "x itself": lambda x, t: x,
    "another dtype": lambda x, t: 0.3 * x.double(),
}
FS = {
    "f(x, t)": lambda x, t: torch.sin(3 * x) - t * x,
    "x itself": lambda x, t: x,
    "a view": lambda x, t: x.flip(0).flip(0).view(x.shape),
    "a view of x": lambda x, t: x[:1].expand(x.shape),
    "a number": lambda x, t: 0.25,
    "0-dim": lambda x, t: t,
    "another dtype": lambda x, t: -x.double(),
}


@pytest.mark.parametrize("shape", [(5,), (5, 1), (4, 3), (3, 2, 2)], ids=str)
@pytest.mark.parametrize("g", GS)
def test_the_loop_in_place_takes_the_steps_of_step(g, shape):
    for kind in ("elementwise", "scalar"):
        process = Returns(FS["f(x, t)"], GS[g], kind)
        x = start(*shape)
        before, states = x.clone(), plain(process, x, TS)
        solution = integrate(process, x, TS, EulerMaruyama(), seed=3)
        torch.testing.assert_close(solution.x, states[-1], rtol=1e-12, atol=1e-12)
        path = integrate(process, x, TS, EulerMaruyama(), seed=3, keep=True).path
        torch.testing.assert_close(path[1:], torch.stack(states), rtol=1e-12, atol=1e-12)
        assert torch.equal(path[-1], solution.x) and torch.equal(x, before)
        assert solution.nfe == len(TS) - 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("f", FS)
def test_drifts_of_every_make_give_the_steps_of_step(f, dtype):
    process = Returns(FS[f], GS["g(x)"])
    x = start(4, 3, dtype=dtype)
    end = integrate(process, x, TS, EulerMaruyama(), seed=3).x
    tolerance = 50 * torch.finfo(dtype).eps
    expected = plain(process, x, TS)[-1].to(dtype)
    assert end.dtype == dtype
    torch.testing.assert_close(end, expected, rtol=tolerance, atol=tolerance)


def test_matrix_noise_takes_the_steps_of_step():
    matrix = torch.tensor([[1.0, 0.2, 0.0], [0.3, -0.5, 0.4]], dtype=torch.float64)
    process = Returns(FS["f(x, t)"], lambda x, t: x[..., None] * matrix, "matrix")
    end = integrate(process, start(4, 2), TS, EulerMaruyama(), seed=3).x
    torch.testing.assert_close(end, plain(process, start(4, 2), TS)[-1], rtol=1e-12, atol=1e-12)


def test_a_spread_of_its_own_is_asked():
    class Own(Growth):
        def spread(self, x, t, z):
            return 2 * super().spread(x, t, z)

    doubled, own = (
        integrate(p, start(4, 2), TS, EulerMaruyama(), seed=3).x for p in (Growth(0.3, 1.0), Own())
    )
    torch.testing.assert_close(doubled, own, rtol=1e-12, atol=1e-12)


def test_gradients_flow_as_before():
    volatility = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x = start(4, 2).requires_grad_()
    process = Returns(lambda x, t: -x, lambda x, t: volatility)
    integrate(process, x, TS, EulerMaruyama(), seed=3, grad=True).x.sum().backward()
    h = TS.diff()
    assert torch.allclose(x.grad, (1 - h).prod().expand_as(x))
    assert volatility.grad.isfinite() and volatility.grad != 0


def test_a_constant_that_is_changed_in_place_is_read_again():
    g = torch.tensor(0.0, dtype=torch.float64)

    def diffusion(x, t):
        return g.fill_(float(t))

    end = integrate(Returns(FS["0-dim"], diffusion), start(4, 2), TS, EulerMaruyama(), seed=3).x
    expected = plain(Returns(FS["0-dim"], GS["0-dim"]), start(4, 2), TS)[-1]
    shifted = plain(Returns(FS["0-dim"], lambda x, t: t), start(4, 2), TS)[-1]
    torch.testing.assert_close(end, shifted, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(end, expected)


# ---- nobody sees a buffer that is written again


@pytest.mark.parametrize("keep", ["x", "x.view(-1)", "x[1:]", "x.numpy()", "f", "both"])
def test_what_a_drift_keeps_is_not_written_over(keep):
    kept, copies, answer = [], [], {}

    def drift(x, t):
        f = torch.sin(x)
        view = {
            "x": x,
            "x.view(-1)": x.view(-1),
            "x[1:]": x[1:],
            "x.numpy()": x.numpy(),
            "f": f,
            "both": x.unsqueeze(0),
        }[keep]
        kept.append(view)
        copies.append(torch.as_tensor(view).clone())
        return answer.setdefault("f", f) if keep == "both" else f

    x = start(4, 2)
    process = Returns(drift, GS["g(x)"])
    integrate(process, x, TS, EulerMaruyama(), seed=3)
    assert len(kept) == 12
    for view, copy in zip(kept, copies, strict=True):
        assert torch.equal(torch.as_tensor(view), copy)


def test_states_of_a_trajectory_are_tensors_of_their_own():
    path = list(trajectory(Growth(), start(4, 2), TS, EulerMaruyama(), seed=3))
    assert len({x.untyped_storage().data_ptr() for _, x in path}) == len(path)
    expected = plain(Growth(), start(4, 2), TS)
    for (_, x), y in zip(path, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_one_buffer_is_used_where_nobody_looks():
    """The guard must not always say no."""
    places = []

    def drift(x, t):
        places.append(x.data_ptr())
        return -x

    integrate(Returns(drift, GS["g(x)"]), start(4, 2), TS, EulerMaruyama(), seed=3)
    assert len(set(places[1:])) == 1


# ---- memory is flat in the number of steps


def live_tensors():
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


class Hoarder(EulerMaruyama):
    """A planted fault: all times at once."""

    def finish(self, process, x, ts, noise, final):
        times = ts.unbind(0)
        yield from super().finish(process, x, ts, noise, final)
        del times


def tensors_alive(solver, steps):
    """In the middle of a run, at step 500."""
    seen = []

    def drift(x, t):
        seen.append(live_tensors() if len(seen) == 500 else 0)
        return -x

    ts = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    integrate(Returns(drift, GS["0-dim"]), start(4, 2), ts, solver, seed=3)
    return max(seen)


@pytest.mark.parametrize("solver", [EulerMaruyama(), EulerHeun()], ids=repr)
def test_memory_is_flat_in_the_number_of_steps(solver):
    few, many = (tensors_alive(solver, steps) for steps in (600, 2400))
    assert abs(many - few) < 20
    assert tensors_alive(Hoarder(), 2400) > few + 1000


# ---- errors name the argument

BAD = [
    (lambda x, t: x.sum(1), lambda x, t: 0.1, r"drift\(x, t\) returned shape \(4,\)"),
    (lambda x, t: x[None], lambda x, t: 0.1, r"drift\(x, t\) returned shape \(1, 4, 3\)"),
    (lambda x, t: None, lambda x, t: 0.1, r"drift\(x, t\) returned NoneType"),
    (lambda x, t: x, lambda x, t: x.sum(1), r"diffusion\(x, t\) returned shape \(4,\)"),
    (lambda x, t: x, lambda x, t: x[None], r"diffusion\(x, t\) returned shape \(1, 4, 3\)"),
    (lambda x, t: x, lambda x, t: "0.1", r"diffusion\(x, t\) returned str"),
    (lambda x, t: x, lambda x, t: None, r"diffusion\(x, t\) returned NoneType"),
]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("case", range(len(BAD)))
def test_wrong_shapes_are_refused_by_name(case, late):
    f, g, message = BAD[case]
    if late:  # after steps in place
        bad_f, bad_g = f, g
        f = lambda x, t: bad_f(x, t) if t > 0.5 else -x  # noqa: E731
        g = lambda x, t: bad_g(x, t) if t > 0.5 else 0.1  # noqa: E731
    with pytest.raises(ShapeError, match=message):
        integrate(Returns(f, g), start(4, 3), TS, EulerMaruyama(), seed=3)


def test_a_nan_is_found_and_its_step_named():
    def drift(x, t):
        return x * math.nan if t > 0.5 else x

    with pytest.raises(NonFiniteError, match=r"at step 9 of 12"):
        integrate(Returns(drift, GS["g(x)"]), start(4, 2), TS, EulerMaruyama(), seed=3)


# ---- noise in blocks


@settings(max_examples=40)
@given(
    st.integers(0, 2**63 - 1),
    st.sampled_from([(), (1,), (3,), (16,), (33,), (64,), (65,), (2, 5)]),
    st.sampled_from([1, 7, 64, 65, 300, 4096, 4100, 5000]),
    st.sampled_from(DTYPES),
)
def test_a_small_batch_is_the_beginning_of_a_large_one_at_every_call(seed, shape, batch, dtype):
    """Beyond the samples drawn in blocks too."""
    batch = max(1, batch // max(1, math.prod(shape)))
    few, many = (SeededNoise(seed, (n, *shape), dtype) for n in (batch, batch + batch // 2 + 1))
    for call in range(1, 53):
        a, b = few(T, S), many(T, S)
        assert torch.equal(a, b[:batch])
        if call in (1, 25, 26, 52):
            assert torch.equal(few.draw(call), a)


@pytest.mark.parametrize("seed", [7, range(5)], ids=str)
@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 64), (5, 65), (5, 2, 4), (0, 3), (5, 0)])
@pytest.mark.parametrize("first", [1, 4])
def test_lent_calls_and_chunks_are_the_calls(shape, seed, first):
    seed = seed if isinstance(seed, int) or shape[0] else 7
    calls = [SeededNoise(seed, shape).draw(first + k) for k in range(100)]
    borrowed = SeededNoise(seed, shape, first=first).borrow()
    chunks = SeededNoise(seed, shape, first=first).chunks(50)
    assert all(torch.equal(next(borrowed), z) for z in calls)
    assert all(torch.equal(next(chunks), torch.stack(calls[k : k + 50])) for k in (0, 50))


def test_calls_can_be_made_in_any_order():
    noise = SeededNoise(3, (6, 2))
    straight = [noise(T, S) for _ in range(60)]
    for call in (30, 1, 60, 25, 26):
        noise.call = call
        assert torch.equal(noise(T, S), straight[call - 1])


def test_a_call_that_was_changed_in_place_changes_no_other():
    a, b = SeededNoise(3, (6, 2)), SeededNoise(3, (6, 2))
    for _ in range(30):
        assert torch.equal(a(T, S).mul_(1), b(T, S).clone())
        a.draw(a.call).zero_()


def test_blocks_have_streams_of_their_own():
    """The first block is none of the first calls: all 4000 numbers differ."""
    in_blocks = torch.stack([SeededNoise(3, (100, 2)).draw(call) for call in range(1, 21)])
    call_by_call = torch.cat([SeededNoise(3, (100, 200)).draw(call) for call in range(1, 21)])
    assert not torch.isin(in_blocks, call_by_call[:, :200]).all()
    assert _BLOCKS > 2**39


# ---- the compiled road


@pytest.fixture
def short(monkeypatch):
    """Graphs of four steps, which are soon compiled."""
    monkeypatch.setattr(compiled, "STEPS", 4)
    compiled._GRAPHS.clear()
    yield
    compiled._GRAPHS.clear()


def compile_or_skip(*args, **options):
    try:
        return integrate(*args, compile=True, **options)
    except SolverError as error:
        cause = str(error.__cause__)
        if "InvalidCxxCompiler" in cause or "No working C++ compiler" in cause:
            pytest.skip("no C++ compiler on this machine")
        raise


@pytest.mark.filterwarnings("ignore")
def test_compiled_steps_are_the_steps(short, monkeypatch):
    """Any grid, the remainder too; and the second run compiles nothing."""
    x, ts = start(3, 2), torch.linspace(0, 1, 11, dtype=torch.float64)
    compile_or_skip(Growth(), x, ts, EulerMaruyama(), seed=3)
    monkeypatch.setattr(torch, "compile", None)
    for seed, grid in ((3, ts), (4, ts**2), (4, ts[:9]), (4, ts[:3])):
        run, eager = (
            integrate(Growth(), x, grid, EulerMaruyama(), seed=seed, compile=compile)
            for compile in (True, False)
        )
        torch.testing.assert_close(run.x, eager.x, rtol=1e-12, atol=1e-12)
        assert run.nfe == eager.nfe == len(grid) - 1 and not run.fused


@pytest.mark.filterwarnings("ignore")
def test_a_solver_with_stages_is_compiled_too(short):
    class Additive(Growth):
        additive = True

        def diffusion(self, x, t):
            return 1 + t

    x, ts = start(3, 2), torch.linspace(0, 1, 10, dtype=torch.float64)
    run = compile_or_skip(Additive(), x, ts, Heun(), seed=3)
    eager = integrate(Additive(), x, ts, Heun(), seed=3)
    torch.testing.assert_close(run.x, eager.x, rtol=1e-12, atol=1e-12)
    assert run.nfe == eager.nfe == 18


def test_large_states_have_short_graphs(short, monkeypatch):
    """With a compiler that notes what it is given: at most NUMBERS normals, or one step."""
    seen = []

    def noting(steps, **options):
        return lambda *args: seen.append(len(args[-1])) or steps(*args)

    monkeypatch.setattr(torch, "compile", noting)
    monkeypatch.setattr(compiled, "NUMBERS", 60)
    for size, per_graph in ((15, 4), (16, 3), (30, 2), (31, 1), (200, 1)):
        seen.clear()
        integrate(Growth(), start(size), TS, EulerMaruyama(), seed=3, compile=True)
        assert set(seen) == {per_graph} and len(seen) == 12 // per_graph


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_compiled_is_refused_with_the_reason(short):
    def branching(x, t):
        return x if x.sum() > 0 else -x

    with pytest.raises(SolverError, match=r"compile=True: torch.compile could not .* leave out"):
        integrate(Returns(branching, GS["g(x)"]), start(3, 2), TS, EulerMaruyama(), compile=True)
    try:
        integrate(Returns(branching, GS["g(x)"]), start(3, 2), TS, EulerMaruyama(), compile=True)
    except SolverError as error:
        assert isinstance(error.__cause__, TorchDynamoException)


def test_a_missing_compiler_is_said(short, monkeypatch):
    def broken(*args, **options):
        def run(*args):
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(SolverError, match=r"No working C\+\+ compiler.* leave out compile=True"):
        integrate(Growth(), start(3, 2), TS, EulerMaruyama(), compile=True)


@pytest.mark.parametrize("option", ["keep", "grad"])
def test_compile_gives_the_last_state_alone(option):
    with pytest.raises(ArgumentError, match=f"leave out {option}=True, or compile=True"):
        integrate(Growth(), start(3, 2), TS, EulerMaruyama(), compile=True, **{option: True})


def test_solvers_without_a_step_are_not_compiled(short):
    with pytest.raises(PairingError, match=r"compile=True: TorchSDE .* EulerMaruyama\(\)"):
        integrate(Growth(), start(3, 2), TS, TorchSDE("euler"), compile=True)


def test_solvers_with_a_memory_are_not_compiled(short):
    @dataclass(frozen=True)
    class Remembers(EulerMaruyama):
        def step(self, process, x, t, s, noise, memory):
            x, _ = super().step(process, x, t, s, noise, None)
            return x, x

    with pytest.raises(PairingError, match="compile=True: Remembers remembers"):
        integrate(Growth(), start(3, 2), TS, Remembers(), compile=True)


def test_a_nan_in_a_compiled_run_is_found_and_its_step_named(short, monkeypatch):
    """With a compiler that does nothing, to be quick."""
    monkeypatch.setattr(torch, "compile", lambda run, **options: run)

    def drift(x, t):
        return torch.where(t > 0.5, x * math.nan, x)

    with pytest.raises(NonFiniteError, match="at step 9 of 12"):
        integrate(
            Returns(drift, GS["g(x)"]), start(3, 2), TS, EulerMaruyama(), seed=3, compile=True
        )
