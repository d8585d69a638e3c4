"""torchdiffeq's methods as solvers: inside their span, in one call, in any dtype, never silent."""

import math

import pytest
import torch
import torchdiffeq

from sdeflow import (
    SDE,
    VP,
    ArgumentError,
    Denoiser,
    GridError,
    NonFiniteError,
    SolverError,
    TorchDiffEq,
    encode,
    integrate,
    probability_flow,
    sample,
    trajectory,
)
from sdeflow.backends import ODE_METHODS
from sdeflow.backends.ode import SCIPY as SCIPY_METHODS
from sdeflow.grid import log_snr, uniform

DOUBLE = {"dtype": torch.float64}
SCIPY = "scipy_solver"
ADAPTIVE = [m for m, (_, evaluations) in ODE_METHODS.items() if evaluations is None]
FIXED = [m for m in ODE_METHODS if m not in ADAPTIVE]
every_method = pytest.mark.parametrize("method", ODE_METHODS)
adaptive = pytest.mark.parametrize("method", ADAPTIVE)


class ODE(SDE):
    """dx/dt = slope(x, t), either way in time."""

    direction = 0

    def __init__(self, slope, T=1.0):
        self.slope, self.T = slope, T

    def drift(self, x, t):
        return self.slope(x, t)

    def diffusion(self, x, t):
        return torch.zeros_like(x)


def flow(net=torch.tanh):
    return probability_flow(VP(), Denoiser(lambda x, t: net(x), VP(), "v"))


def line(n=11):
    return torch.linspace(0, 1, n, **DOUBLE)


# ---- torchdiffeq itself


@every_method
@pytest.mark.parametrize("backwards", [False, True])
def test_a_run_is_torchdiffeq_s_own(method, backwards):
    ts = line().flip(0) if backwards else line()
    x = torch.randn(4, 3, **DOUBLE)

    def slope(t, x):
        return torch.cos(3 * t) * torch.tanh(x)

    """Down to its options: see `test_explicit_adams...` and the norm of the worst sample."""
    options = {"norm": lambda y: y.square().mean(1).sqrt().max()} if method in ADAPTIVE else {}
    options |= {"max_order": 5} if method == "explicit_adams" else {}
    theirs = torchdiffeq.odeint(slope, x, ts, rtol=1e-6, atol=1e-6, method=method, options=options)
    process = ODE(lambda x, t: slope(t, x))
    ours = integrate(process, x, ts, TorchDiffEq(method, 1e-6, 1e-6), keep=True).path
    # Theirs steps past the end and interpolates; ours ends there.
    close = 1e-4 if method in ADAPTIVE else 1e-13
    torch.testing.assert_close(ours, theirs, rtol=close, atol=close)


@every_method
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4)])
def test_states_of_any_rank_are_their_components(method, shape):
    x = torch.randn(4, *shape, **DOUBLE)
    many, flat = (
        integrate(ODE(lambda x, t: torch.cos(x)), y, line(), TorchDiffEq(method)).x
        for y in (x, x.reshape(4, -1))
    )
    torch.testing.assert_close(many, flat.reshape(x.shape), rtol=1e-13, atol=1e-13)


# ---- where and how often


@every_method
@pytest.mark.parametrize("backwards", [False, True])
def test_nothing_is_evaluated_outside_the_span(method, backwards):
    seen = []

    def slope(x, t):
        seen.append(float(t))
        return -x

    ts = torch.linspace(0.3, 0.7, 7, **DOUBLE)
    ts = ts.flip(0) if backwards else ts
    for dtype in (torch.float32, torch.float64):
        integrate(ODE(slope), torch.randn(4, 3, dtype=dtype), ts, TorchDiffEq(method))
    assert float(ts[0]) in seen
    assert float(ts.min()) <= min(seen) and max(seen) <= float(ts.max())


@adaptive
def test_the_grid_only_says_where_to_report(method):
    """One call over the whole span: as many evaluations for 60 reports as for one. One call an
    interval would take several times more with a method of some order."""
    x = torch.randn(4, 3, **DOUBLE)
    ts = log_snr(VP(), 60)
    whole = integrate(flow(), x, ts[[0, -1]], TorchDiffEq(method))
    reported = integrate(flow(), x, ts, TorchDiffEq(method), keep=True)
    assert whole.nfe <= reported.nfe <= 1.1 * whole.nfe
    if method in ("dopri5", "dopri8", "bosh3"):
        pieces = [integrate(flow(), x, ts[k : k + 2], TorchDiffEq(method)).nfe for k in range(60)]
        assert sum(pieces) > 2.5 * reported.nfe
    torch.testing.assert_close(whole.x, reported.x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", FIXED)
def test_a_fixed_step_method_takes_the_steps_of_the_grid(method):
    seen = set()

    def slope(x, t):
        seen.add(float(t))
        return -x

    ts = line()
    integrate(ODE(slope), torch.ones(1, 1, **DOUBLE), ts, TorchDiffEq(method))
    assert set(ts[:-1].tolist()) <= seen


@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams"])
def test_adams_is_refused_on_unequal_steps(method):
    def never(x, t):
        raise AssertionError("evaluated")

    for ts in (log_snr(VP(), 10), line()[[0, 1, 3]]):
        with pytest.raises(GridError, match=f"{method} has coefficients for equal steps only.*rk4"):
            integrate(ODE(never), torch.ones(1, 1), ts, TorchDiffEq(method))


# ---- hard problems


RATE = torch.zeros(256, 1, **DOUBLE)
RATE[17] = 30.0


@adaptive
def test_a_hard_sample_is_solved_as_well_among_easy_ones(method):
    """Exactly as well; by scipy, which knows one norm for all, at least as well."""

    def error(rate):
        process, start = ODE(lambda x, t: -rate * x), torch.ones_like(rate)
        end = integrate(process, start, line(2), TorchDiffEq(method, 1e-6, 1e-6)).x
        return float((end - torch.exp(-rate)).abs().max())

    among, alone = error(RATE), error(RATE[17:18])
    assert among <= alone if method == SCIPY else among == pytest.approx(alone, rel=1e-6)


def test_the_library_s_own_norm_would_sacrifice_it():
    """The planted fault of the theorem above."""

    def error(rate):
        options = {"rtol": 1e-6, "atol": 1e-6, "method": "dopri5"}
        end = torchdiffeq.odeint(lambda t, x: -rate * x, torch.ones_like(rate), line(2), **options)
        return float((end[-1] - torch.exp(-rate)).abs().max())

    assert error(RATE) > 3 * error(RATE[17:18])


@adaptive
def test_the_bound_on_evaluations_ends_a_stiff_run(method):
    process = ODE(lambda x, t: -1e6 * (x - torch.cos(t)))
    solver = TorchDiffEq(method, max_evaluations=200, scipy="RK45")
    with pytest.raises(SolverError, match=rf"{method} made max_evaluations=200 .* loosen rtol"):
        integrate(process, torch.zeros(2, 1, **DOUBLE), line(), solver)


@adaptive
def test_a_solution_that_runs_off_is_an_error_of_ours(method):
    """dx/dt = x^2 from 10 is infinite at t = 0.1."""
    process = ODE(lambda x, t: x**2)
    with pytest.raises((SolverError, NonFiniteError)):
        integrate(
            process,
            torch.full((2, 1), 10.0, **DOUBLE),
            line(),
            TorchDiffEq(method, max_evaluations=2000),
        )


@every_method
def test_a_nan_is_named_with_its_time(method):
    def slope(x, t):
        return x * math.nan if t > 0.55 else -x

    where = r"at t=0\.[5-9]|at step [67] of 10, from t=0\.[56]"
    with pytest.raises(NonFiniteError, match=where):
        integrate(ODE(slope), torch.ones(2, 1, **DOUBLE), line(), TorchDiffEq(method))
    with pytest.raises(NonFiniteError, match=where):
        list(trajectory(ODE(slope), torch.ones(2, 1, **DOUBLE), line(), TorchDiffEq(method)))


@pytest.mark.parametrize("scipy", SCIPY_METHODS)
@pytest.mark.parametrize("backwards", [False, True])
def test_every_method_of_scipy_is_there(scipy, backwards):
    ts = line().flip(0) if backwards else line()
    x = torch.linspace(0.5, 1, 6, **DOUBLE).view(3, 2)
    process = ODE(lambda x, t: torch.cos(3 * t) * x)
    run = integrate(process, x, ts, TorchDiffEq(SCIPY, 1e-6, 1e-6, scipy=scipy), keep=True)
    exact = x * torch.exp((torch.sin(3 * ts) - torch.sin(3 * ts[0])) / 3)[:, None, None]
    torch.testing.assert_close(run.path, exact, rtol=1e-4, atol=0)
    assert TorchDiffEq(SCIPY, scipy=scipy).order == SCIPY_METHODS[scipy]


@pytest.mark.parametrize("scipy", ["Radau", "BDF", "LSODA"])
def test_a_stiff_problem_has_a_solver(scipy):
    process = ODE(lambda x, t: -1e6 * (x - torch.cos(t)))
    run = integrate(process, torch.zeros(2, 1, **DOUBLE), line(), TorchDiffEq(SCIPY, scipy=scipy))
    assert run.nfe < 300
    torch.testing.assert_close(run.x, torch.full((2, 1), math.cos(1), **DOUBLE), rtol=0, atol=1e-4)


def test_explicit_adams_is_stable_where_its_order_shows():
    """The library's own choice, 11 steps back, is not: the planted fault."""
    x, ts = torch.ones(1, 1, **DOUBLE), line(81)

    def error(end):
        return abs(float(end) - math.exp(-1.3))

    own = torchdiffeq.odeint(lambda t, x: -1.3 * x, x, ts, method="explicit_adams")[-1]
    ours = integrate(ODE(lambda x, t: -1.3 * x), x, ts, TorchDiffEq("explicit_adams")).x
    assert error(own) > 1e3 * error(ours) and error(ours) < 1e-6


def test_implicit_adams_fails_where_its_iteration_does():
    process = ODE(lambda x, t: -80 * x)
    with pytest.raises(SolverError, match=r"did not converge at t=0\.\d+ .*finer grid, or .*Radau"):
        integrate(process, torch.ones(2, 1, **DOUBLE), line(), TorchDiffEq("implicit_adams"))


@pytest.mark.parametrize("method", FIXED)
def test_the_times_of_the_grid_reach_the_drift_unrounded(method):
    """In single precision too; the library rounds them."""
    seen, ts = [], torch.linspace(0.1, 0.7, 8, **DOUBLE)

    def slope(x, t):
        seen.append(float(t))
        return -x

    integrate(ODE(slope), torch.ones(2, 1), ts, TorchDiffEq(method))
    assert set(ts[:-1].tolist()) <= set(seen)


# ---- dtypes, batches, directions


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_state_keeps_its_dtype_and_the_steps_a_wider_one(method, dtype):
    """The sum of a thousand steps of 1e-3 shows it: in half precision alone it would stick."""
    x = torch.linspace(1, 2, 8, dtype=dtype).view(4, 2)
    made = integrate(ODE(lambda x, t: 1 + 0 * x), x, line(1001), TorchDiffEq(method)).x
    assert made.dtype == dtype
    assert (made.double() - x.double() - 1).abs().max() < max(3 * torch.finfo(dtype).eps, 1e-4)


@every_method
@pytest.mark.parametrize("shape", [(0, 3), (0,), (2, 0)])
def test_an_empty_batch_stays_empty(method, shape):
    solution = sample(
        flow(), shape, solver=TorchDiffEq(method), grid=uniform(VP(), 5), seed=1, keep=True
    )
    assert solution.x.shape == shape and solution.path.shape == (6, *shape)
    assert solution.nfe == 0


@every_method
def test_the_way_up_undoes_the_way_down(method):
    """encode runs increasing times."""
    grid = uniform(VP(), 100, t_min=0.05, t_max=0.8)
    x0 = torch.randn(4, 2, **DOUBLE)
    solver = TorchDiffEq(method, 1e-7, 1e-7)
    there = encode(flow(), x0, solver=solver, grid=grid)
    back = integrate(flow(), there.x, grid, solver)
    bound = 0.1 if method == "euler" else 5e-3
    assert (there.x - x0).abs().max() > 0.5
    assert (back.x - x0).abs().max() < bound


@pytest.mark.parametrize("method", [*FIXED, "dopri5"])
def test_gradients_flow_through(method):
    x = torch.randn(3, 2, **DOUBLE, requires_grad=True)

    def end(x):
        process = ODE(lambda x, t: torch.sin(x))
        return integrate(process, x, line(), TorchDiffEq(method), grad=True).x

    assert torch.autograd.gradcheck(end, (x,), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dopri"}, r"method='dopri' is unknown; did you mean 'dopri5'"),
        ({"scipy": "Radau5"}, r"scipy='Radau5' is unknown; did you mean 'Radau'"),
        ({"rtol": 0.0}, r"rtol=0.0 must be in \(0, 1\)"),
        ({"atol": -1e-5}, r"atol=-1e-05 must be in \(0, 1\)"),
        ({"atol": math.nan}, r"atol=nan must be in \(0, 1\)"),
        ({"max_evaluations": 0}, r"max_evaluations=0 must be at least 1"),
        ({"max_evaluations": 2.5}, r"max_evaluations=2.5 .* whole number"),
    ],
)
def test_a_bad_option_is_refused_by_name(options, message):
    with pytest.raises(ArgumentError, match=message):
        TorchDiffEq(**options)
