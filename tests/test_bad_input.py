"""Bad input of every solver: an error that names the argument, the step and the time. The limit of
time on each test is a guard against hanging."""

import math

import pytest
import torch

from sdeflow import (
    OU,
    SDE,
    VP,
    BrownianPath,
    GridError,
    NonFiniteError,
    PairingError,
    ReverseSDE,
    SdeflowError,
    SolverError,
    TorchDiffEq,
    TorchSDE,
    catalogue,
    get,
    integrate,
    sample,
    trajectory,
)
from sdeflow.backends import ODE_METHODS
from sdeflow.system import LinearSystem

pytestmark = pytest.mark.timeout(20)
DOUBLE = {"dtype": torch.float64}
NAN = math.nan


def names():
    """Every solver that runs the flow or the reverse of a Gaussian SDE."""
    entries = catalogue("solver")
    return [name for name in entries if entries[name].distribution == "sdeflow"]


def process_for(solver, score):
    """A process that the solver takes: a reverse SDE, or a flow."""
    for eta in (1.0, 0.0):
        process = ReverseSDE(VP(), score, eta)
        try:
            solver.check(process)
        except PairingError:
            continue
        return process
    pytest.skip("for other processes")


def line(n=11, start=0.9, end=0.1):
    return torch.linspace(start, end, n, **DOUBLE)


class ODE(SDE):
    direction = 0

    def __init__(self, slope):
        self.slope = slope

    def drift(self, x, t):
        return self.slope(x, t)

    def diffusion(self, x, t):
        return torch.zeros_like(x)


# ---- grids

GRIDS = [
    # times, what the message names
    ([0.9, 0.9], r"ts\[0\]=0\.9 is followed by ts\[1\]=0\.9"),
    ([0.9, 0.5, 0.5, 0.1], r"ts\[1\]=0\.5 is followed by ts\[2\]=0\.5"),
    ([0.9, 0.5, 0.7, 0.1], r"ts\[1\]=0\.5 is followed by ts\[2\]=0\.7"),
    ([0.9, NAN, 0.1], r"ts\[1\]=nan must be a finite time"),
    ([NAN, NAN], r"ts\[0\]=nan must be a finite time"),
    ([0.9, 0.5, -0.1], r"ts\[2\]=-0\.1 must be a finite time >= 0"),
    ([math.inf, 0.5], r"ts\[0\]=inf must be a finite time"),
    ([0.9], r"ts has shape \(1,\); it must be \(N\+1,\)"),
    ([], r"ts has shape \(0,\)"),
    ([2.0, 0.5], "ts reaches 2.0, beyond the last time"),
    ("soon", "ts='soon' must be times"),
    (None, "ts=None must be times"),
]


@pytest.mark.parametrize(("ts", "message"), GRIDS, ids=str)
@pytest.mark.parametrize("name", names())
def test_a_bad_grid_is_refused_by_place_before_the_first_evaluation(name, ts, message):
    def never(x, t):
        raise AssertionError("the score was evaluated")

    process = process_for(get("solver", name), never)
    with pytest.raises(GridError, match=message):
        integrate(process, torch.ones(2, 3), ts, name, seed=1)


@pytest.mark.parametrize("steps", [0, -1, -20, NAN, 2.5, "ten", None, True])
def test_a_bad_number_of_steps_is_refused_by_name(steps):
    with pytest.raises(SdeflowError, match="must be (at least 1|a whole number)"):
        sample(ReverseSDE(VP(), lambda x, t: -x), (2, 3), solver="euler_maruyama", steps=steps)


# ---- a NaN at step k


def broken(x, t):
    """A score that is NaN from t = 0.45 down."""
    return -x if float(torch.as_tensor(t).max()) > 0.45 else x * NAN


WHERE = r"at t=0\.[1234]\d*|from t=0\.[3456]\d* to 0\.[2345]|at step [4-8] of 10|sample \d"


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("run", ["integrate", "keep", "trajectory"])
def test_a_nan_in_the_score_is_named_with_its_step_or_its_time(name, run):
    """Methods that look ahead meet it a step early, those that average a step late."""
    process = process_for(get("solver", name), broken)
    if isinstance(process.forward, LinearSystem):
        pytest.skip("for other processes")
    x = torch.ones(2, 3, **DOUBLE)
    with pytest.raises(NonFiniteError, match=WHERE):
        if run == "trajectory":
            list(trajectory(process, x, line(), name, seed=1))
        else:
            integrate(process, x, line(), name, seed=1, keep=run == "keep")


def test_a_nan_on_a_given_path_is_named_with_its_step():
    path = BrownianPath(1, (2, 3), line())
    process, x = ReverseSDE(VP(), broken), torch.ones(2, 3, **DOUBLE)
    with pytest.raises(NonFiniteError, match=r"at step [67] of 10, from t=0\.[45]"):
        integrate(process, x, line(), TorchSDE("heun"), noise=path)


@pytest.mark.parametrize("keep", [False, True])
def test_a_nan_on_noise_that_is_gone_is_named_where_the_states_are_kept(keep):
    noises = iter(torch.randn(10, 2, 3, **DOUBLE))
    process, x = ReverseSDE(VP(), broken), torch.ones(2, 3, **DOUBLE)
    message = r"at step [67] of 10" if keep else r"during the run \(keep=True, .* tell the step\)"
    with pytest.raises(NonFiniteError, match=message):
        solver = TorchSDE("euler")
        integrate(process, x, line(), solver, noise=lambda t, s: next(noises), keep=keep)


@pytest.mark.parametrize(
    ("solver", "process"),
    [
        (TorchSDE("midpoint", adjoint=True), ReverseSDE(VP(), broken)),
        (TorchSDE("reversible_heun", adjoint=True), ReverseSDE(VP(), broken)),
        (TorchDiffEq("rk4", adjoint=True), ReverseSDE(VP(), broken, 0.0)),
        (TorchDiffEq("dopri5", adjoint=True), ReverseSDE(VP(), broken, 0.0)),
    ],
    ids=lambda value: getattr(value, "method", None),
)
def test_a_nan_in_a_run_with_an_adjoint_is_named(solver, process):
    x = torch.ones(2, 3, **DOUBLE, requires_grad=True)
    with pytest.raises(NonFiniteError, match=WHERE):
        integrate(process, x, line(), solver, seed=1, grad=True)


def test_a_nan_in_the_noise_is_named():
    def noise(t, s):
        return torch.full((2, 3), NAN if t < 0.45 else 0.0, **DOUBLE)

    x = torch.ones(2, 3, **DOUBLE)
    with pytest.raises(NonFiniteError, match=r"at step 7 of 10, from t=0\.42"):
        for _ in trajectory(ReverseSDE(VP(), lambda x, t: -x), x, line(), TorchSDE(), noise=noise):
            pass


@pytest.mark.parametrize("x", [NAN, math.inf])
@pytest.mark.parametrize("name", ["torchsde_srk", "torchdiffeq_dopri5", "euler_maruyama"])
def test_a_start_that_is_not_finite_is_refused(name, x):
    process = process_for(get("solver", name), lambda x, t: -x)
    with pytest.raises(NonFiniteError, match="x, the state to start from"):
        integrate(process, torch.tensor([[0.0, x]]), line(), name)


# ---- stiff problems and solutions that run off

ADAPTIVE = [m for m, (_, count) in ODE_METHODS.items() if count is None]


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_stiff_problem_ends_an_explicit_adaptive_method_with_a_remedy(method):
    """dx/dt = -1e9 (x - cos t): the steps that stability allows are 1e-9 long."""
    process = ODE(lambda x, t: -1e9 * (x - torch.cos(t)))
    solver = TorchDiffEq(method, max_evaluations=1000, scipy="DOP853")
    with pytest.raises(SolverError, match=r"max_evaluations=1000 .* is at t=.*scipy='Radau'"):
        integrate(process, torch.zeros(2, 1, **DOUBLE), line(3, 0, 1), solver)


@pytest.mark.parametrize("scipy", ["RK23", "RK45", "DOP853", "Radau", "BDF", "LSODA"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_solution_that_runs_off_ends_with_an_error(method, scipy):
    """dx/dt = x^2 from 10 is infinite at t = 0.1."""
    if method != "scipy_solver" and scipy != "LSODA":
        return
    solver = TorchDiffEq(method, max_evaluations=1000, scipy=scipy)
    with pytest.raises((SolverError, NonFiniteError)):
        integrate(ODE(lambda x, t: x**2), torch.full((2, 1), 10.0, **DOUBLE), line(3, 0, 1), solver)


@pytest.mark.parametrize("name", [n for n in names() if "torchsde" in n])
def test_steps_too_long_for_a_stiff_sde_are_named(name):
    """An explicit method blows up, and says where."""
    sde, ts = OU(theta=1e6), torch.linspace(0, 1, 200, **DOUBLE)
    with pytest.raises(
        NonFiniteError, match=r"at step \d+ of 199, from t=0\.\d+ to .*smaller steps"
    ):
        integrate(sde, torch.ones(2, 3, **DOUBLE), ts, name, seed=1)
