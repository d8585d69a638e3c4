"""The adaptive solver: each sample for itself, on a path that stays the same path."""

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ztest import LIMIT, ks_excess, z_of_mean, z_of_variance

import sdeflow.adaptive
from sdeflow import (
    GBM,
    OU,
    SDE,
    VP,
    Adaptive,
    ArgumentError,
    BrownianPath,
    BrownianTree,
    EulerMaruyama,
    GridError,
    NonFiniteError,
    ReverseSDE,
    SeededNoise,
    ShapeError,
    SolverError,
    get,
    integrate,
    probability_flow,
    trajectory,
)
from sdeflow.sde import match
from sdeflow.testing import GaussianData, MixtureData

SPAN = [0.0, 1.0]


class Elementwise(SDE):
    """dx = -x^3 dt + x/2 dw: steep where x is large."""

    def drift(self, x, t):
        return -(x**3)

    def diffusion(self, x, t):
        return 0.5 * x


class Cubic(SDE):
    """x = tanh(w/2 + atanh x_0)."""

    def drift(self, x, t):
        return -0.25 * x * (1 - x * x)

    def diffusion(self, x, t):
        return 0.5 * (1 - x * x)


class Stratonovich(SDE):
    """dx = x o dw: x = x_0 e^w."""

    calculus = "stratonovich"

    def drift(self, x, t):
        return 0 * x

    def diffusion(self, x, t):
        return x


class Decay(SDE):
    """dx = -x/(1 + t) dt + (1 + t) dw: (1 + t) x_t = x_0 + INT (1 + u)^2 dw."""

    additive = True

    def drift(self, x, t):
        return -x / match(1 + t, x)

    def diffusion(self, x, t):
        return match(1 + t, x)


class Scalar(SDE):
    """One Wiener process for all components: x_i = x_0i e^(i w)."""

    noise = "scalar"
    calculus = "stratonovich"

    def drift(self, x, t):
        return 0 * x

    def diffusion(self, x, t):
        return x * torch.arange(1, x.shape[-1] + 1, dtype=x.dtype) / 4


class Coupled(SDE):
    """Matrix noise that does not commute."""

    noise = "matrix"

    def drift(self, x, t):
        return -x

    def diffusion(self, x, t):
        one = torch.ones_like(x[..., 0])
        return torch.stack(
            (torch.stack((one, 0 * one), -1), torch.stack((0 * one, x[..., 0]), -1)), -2
        )


def noises(eta=1.0):
    sde = VP()
    data = GaussianData(sde, torch.tensor(0.3).double(), torch.tensor(0.4).double())
    return ReverseSDE(sde, data, eta)


PROBLEMS = {
    # name             process, times
    "elementwise": (Elementwise(), SPAN),
    "stratonovich": (Stratonovich(), SPAN),
    "additive": (Decay(), SPAN),
    "scalar": (Scalar(), SPAN),
    "matrix": (Coupled(), SPAN),
    "reverse": (noises(), [0.9, 0.4, 0.1]),
    "half": (noises(0.5), [0.9, 0.4, 0.1]),
    "ode": (noises(0.0), [0.9, 0.4, 0.1]),
}


def states(batch, seed=0, dtype=torch.float64):
    """Starts of very unequal difficulty."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.logspace(-1, 1, batch, dtype=torch.float64).unsqueeze(1)
    return (size * torch.randn(batch, 2, dtype=torch.float64, generator=generator)).to(dtype)


# ---- each sample for itself


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_has_the_result_that_it_has_alone(name, dtype):
    process, ts = PROBLEMS[name]
    x, solver = states(9, dtype=dtype), Adaptive(3e-2, 3e-2)
    together = integrate(process, x, ts, solver, seed=range(9)).x
    for k in range(9):
        assert torch.equal(integrate(process, x[k : k + 1], ts, solver, seed=[k]).x[0], together[k])
    few = integrate(process, x[:4], ts, solver, seed=5).x
    assert torch.equal(few, integrate(process, x, ts, solver, seed=5).x[:4])
    assert together.dtype == dtype


def steps_of(process, x, ts, solver, **source):
    """(t, s, accepted) of each sample's tries, in order."""
    tries = [[] for _ in x]

    class Watched(sdeflow.adaptive._Run):
        def _try(self, t, s):
            self.tried = t, s
            return super()._try(t, s)

        def _keep(self, trial, w, j, accept):
            t, s = self.tried
            for k in (t != s).nonzero().flatten().tolist():
                tries[k].append((float(t[k]), float(s[k]), bool(accept[k])))
            return super()._keep(trial, w, j, accept)

    true, sdeflow.adaptive._Run = sdeflow.adaptive._Run, Watched
    try:
        integrate(process, x, ts, solver, **source)
    finally:
        sdeflow.adaptive._Run = true
    return tries


@pytest.mark.parametrize("name", PROBLEMS)
def test_steps_join_and_pass_over_no_time_that_was_looked_at(name):
    process, ts = PROBLEMS[name]
    refused = 0
    for tries in steps_of(process, states(6), ts, Adaptive(3e-2, 3e-2), seed=1):
        made = [(t, s) for t, s, accepted in tries if accepted]
        assert made[0][0] == ts[0] and made[-1][1] == ts[-1]
        assert all(s == t for (_, s), (t, _) in zip(made[:-1], made[1:], strict=True))
        assert {s for _, s, _ in tries} <= {s for _, s in made}
        assert set(ts[1:]) <= {s for _, s in made}
        refused += len(tries) - len(made)
    assert refused > 0 or process.deterministic


def test_steep_samples_take_more_steps():
    x = torch.tensor([[0.1, 0.1], [10.0, 10.0]]).double()
    calm, steep = steps_of(Elementwise(), x, SPAN, Adaptive(3e-2, 3e-2), seed=0)
    assert len(steep) > 3 * len(calm)
    first, last = steep[0], steep[-1]
    assert last[1] - last[0] > 8 * min(s - t for t, s, _ in steep) and first[0] == 0.0


def test_the_batch_costs_what_its_slowest_sample_costs():
    x, solver = states(5), Adaptive(0.03, 0.03)
    alone = [integrate(Decay(), x[k : k + 1], SPAN, solver, seed=[k]).nfe for k in range(5)]
    together = integrate(Decay(), x, SPAN, solver, seed=range(5)).nfe
    assert max(alone) <= together < 1.5 * max(alone)


# ---- the path


def test_the_noise_of_a_seed_is_its_tree():
    x, ts = states(4), [0.0, 0.3, 0.8]
    own, other = (integrate(Decay(), x, ts, Adaptive(), seed=seed).x for seed in (8, 9))
    tree = BrownianTree(8, (4, 2), 0.8)
    assert torch.equal(own, integrate(Decay(), x, ts, Adaptive(), noise=tree).x)
    assert not torch.equal(own, other)


class Fresh(BrownianTree):
    """New increments at every question: what a solver sees that draws as it goes."""

    now, asked = None, 0

    def at(self, t):
        if self.now is None:
            return super().at(t)
        before, w, j = self.now
        self.asked += 1
        z, zeta = SeededNoise(self.asked, (2, *self.shape), torch.float64).draw(1)
        h = match(t - before, w)
        root = h.abs().sqrt()
        return w + root * z, j + h * w + h * root * (z / 2 + zeta / 12**0.5)


class Naive(sdeflow.adaptive._Run):
    """A planted fault: a step refused is tried again with new noise."""

    def _try(self, t, s):
        self.tree.now = t, self.w, self.j
        return super()._try(t, s)


def law_of_growth(tree):
    """log x_1 of dx = x o dw, x_0 = 1, which is a unit normal; by steps that follow the noise."""
    run = integrate(
        Stratonovich(), torch.ones(tree.shape).double(), SPAN, Adaptive(0.02, 0.02), noise=tree
    )
    return run.x.log()


def test_refusing_steps_leaves_the_law_as_it_is():
    """Two z-tests and a KS test, each with a false-alarm rate below 1e-6."""
    logs = law_of_growth(BrownianTree(3, (2000, 1)))
    assert abs(z_of_mean(logs, 0.0)) < LIMIT and abs(z_of_variance(logs, 1.0)) < LIMIT
    assert ks_excess(torch.special.ndtr(logs)) < 1


def test_new_noise_after_a_refusal_would_change_the_law(monkeypatch):
    """It prefers small increments: half the variance is lost."""
    monkeypatch.setattr(sdeflow.adaptive, "_Run", Naive)
    logs = law_of_growth(Fresh(3, (2000, 1)))
    assert z_of_variance(logs, 1.0) < -2 * LIMIT and float(logs.var()) < 0.6
    assert ks_excess(torch.special.ndtr(logs)) > 1


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_reverse_process_has_the_law_of_the_data(eta):
    """Two z-tests, each with a false-alarm rate below 1e-6."""
    process = noises(eta)
    sde, data = process.forward, process.score
    mean, variance = data.law(torch.tensor(1.0).double())
    z = SeededNoise(1, (2000, 2), torch.float64).draw(1)
    x = integrate(
        process, mean + variance.sqrt() * z, [sde.T, 0.02], Adaptive(0.02, 0.02), seed=2
    ).x
    mean, variance = data.law(torch.tensor(0.02).double())
    assert abs(z_of_mean(x, mean)) < LIMIT and abs(z_of_variance(x, variance)) < LIMIT


# ---- convergence


def decay_at_one(x, tree, steps=4096):
    """The exact solution of Decay: INT g dw on short steps, where g^2 is linear, by its areas."""
    ts = torch.linspace(0, 1, steps + 1).double().reshape(-1, 1)
    w, j = tree.at(ts)
    h = 1 / steps
    dw, g = w.diff(dim=0), match((1 + ts.squeeze(1)) ** 2, w)
    area = (j.diff(dim=0) - h * w[:-1]) / h - dw / 2
    return (x + ((g[:-1] + g[1:]) / 2 * dw - (g[1:] - g[:-1]) * area).sum(0)) / 2


EXACT = {
    # name           process, start, solution
    "additive": (Decay(), 2.0, decay_at_one),
    "gbm": (GBM(0.5, 0.8), 1.0, lambda x, tree: x * torch.exp(0.18 + 0.8 * tree.at(1.0)[0])),
    "cubic": (Cubic(), 0.5, lambda x, tree: torch.tanh(tree.at(1.0)[0] / 2 + math.atanh(0.5))),
    "stratonovich": (Stratonovich(), 1.0, lambda x, tree: x * torch.exp(tree.at(1.0)[0])),
}


def error(name, tolerance, batch=100):
    process, start, solution = EXACT[name]
    x, tree = torch.full((batch, 1), start).double(), BrownianTree(3, (batch, 1))
    run = integrate(process, x, SPAN, Adaptive(tolerance, tolerance), noise=tree)
    return float((run.x - solution(x, tree)).abs().mean()), run.nfe


@pytest.mark.parametrize("name", EXACT)
def test_the_strong_error_follows_the_tolerance(name):
    """The error is below the tolerance, and in proportion to it within a factor of two."""
    (loose, _), (tight, _) = error(name, 3e-2), error(name, 3e-3)
    assert loose < 3e-2 and tight < 3e-3
    assert loose / 20 < tight < loose / 5


def test_steps_chosen_beat_equal_steps_where_the_problem_is_uneven():
    """A cubic drift from afar: as many equal steps as this takes evaluations run off."""
    x, tree = torch.full((50, 1), 30.0).double(), BrownianTree(3, (50, 1))
    exact = integrate(Elementwise(), x, SPAN, Adaptive(1e-3, 1e-3), noise=tree).x
    run = integrate(Elementwise(), x, SPAN, Adaptive(3e-2, 3e-2), noise=tree)
    with pytest.raises(NonFiniteError):
        equal = torch.linspace(0, 1, run.nfe + 1).double()
        integrate(Elementwise(), x, equal, get("solver", "heun"), noise=tree)
    assert float((run.x - exact).abs().mean()) < 1e-2


def test_the_order_on_odes_is_three():
    flow = probability_flow(VP(), MixtureData.five(VP()))
    x, reference = states(20), get("solver", "torchdiffeq_dopri8", rtol=1e-12, atol=1e-12)
    exact = integrate(flow, x, [1.0, 0.01], reference).x
    runs = [integrate(flow, x, [1.0, 0.01], Adaptive(tol, tol)) for tol in (1e-3, 1e-6)]
    loose, tight = (float((run.x - exact).abs().mean()) for run in runs)
    assert tight < 1e-5 and tight < loose / 100
    assert runs[1].nfe < 14 * runs[0].nfe  # ten times the steps for a thousandth


def test_odes_run_both_ways():
    flow = noises(0.0)
    x = states(5)
    there = integrate(flow, x, [0.02, 0.9], Adaptive(1e-7, 1e-7)).x
    assert torch.allclose(integrate(flow, there, [0.9, 0.02], Adaptive(1e-7, 1e-7)).x, x, atol=1e-4)


def test_non_commuting_noise_converges():
    x, tree = states(50), BrownianTree(1, (50, 2))
    exact = integrate(
        Coupled(), x, torch.linspace(0, 1, 513).double(), EulerMaruyama(), noise=tree
    ).x
    runs = [integrate(Coupled(), x, SPAN, Adaptive(tol, tol), noise=tree).x for tol in (0.3, 0.01)]
    loose, tight = (float((run - exact).abs().mean()) for run in runs)
    assert tight < loose / 3


# ---- states of any rank, grids, gradients


@settings(max_examples=8)
@given(
    st.lists(st.integers(1, 3), min_size=0, max_size=3).map(tuple),
    st.sampled_from([Elementwise(), Decay(), Stratonovich()]),
    st.lists(st.floats(0.01, 1), min_size=1, max_size=4),
)
def test_states_of_any_rank_and_grids_of_any_steps(shape, process, steps):
    ts = torch.cat((torch.zeros(1), torch.tensor(steps).cumsum(0))).double()
    ts = 0.99 * ts / ts[-1]
    x = torch.linspace(-2, 2, 3 * math.prod(shape)).double().reshape(3, *shape)
    flat = integrate(process, x.reshape(3, -1), ts, Adaptive(0.1, 0.1), seed=3, keep=True)
    run = integrate(process, x, ts, Adaptive(0.1, 0.1), seed=3, keep=True)
    assert run.path.shape == (len(ts), 3, *shape)
    assert torch.equal(run.path.reshape(len(ts), 3, -1), flat.path)
    assert [float(t) for t, _ in trajectory(process, x, ts, Adaptive(0.1, 0.1), seed=3)] == ts[
        1:
    ].tolist()


def test_an_empty_batch_stays_empty():
    assert integrate(Decay(), torch.zeros(0, 2), SPAN, Adaptive(), seed=0).x.shape == (0, 2)


def test_gradients_are_those_of_the_steps_made():
    """x_1 = x_0 e^w: its derivative is x_1/x_0 for the numerical solution too, which is linear."""
    x = torch.tensor([[0.5], [2.0]], dtype=torch.float64, requires_grad=True)
    end = integrate(Stratonovich(), x, SPAN, Adaptive(0.03, 0.03), seed=1, grad=True).x
    (slope,) = torch.autograd.grad(end.sum(), x)
    assert torch.allclose(slope, end.detach() / x.detach())


# ---- what cannot be done is said, at once


class Bursts(SDE):
    """x' = x^2, infinite at t = 1/x_0."""

    direction = 0

    def drift(self, x, t):
        return x * x

    def diffusion(self, x, t):
        return 0 * x


class Stiff(SDE):
    additive = True

    def __init__(self, rate, direction=1):
        self.rate, self.direction = rate, direction

    def drift(self, x, t):
        return self.rate * (torch.cos(match(t, x)) - x)

    def diffusion(self, x, t):
        return 0.1 * torch.ones_like(x)


class BreaksAt(Decay):
    """The drift is NaN from t = 0.6 on, for samples that are negative."""

    def drift(self, x, t):
        return super().drift(x, t) + torch.where((match(t, x) >= 0.6) & (x < 0), math.nan, 0.0)


@pytest.mark.parametrize("rate", [1e2, 1e4, 1e6, 1e12])
@pytest.mark.parametrize("direction", [0, 1])
def test_a_stiff_problem_is_solved_or_given_up_soon(rate, direction):
    process, began = Stiff(rate, direction), time.process_time()
    try:
        end = integrate(process, torch.ones(3, 2).double(), SPAN, Adaptive(), seed=0).x
        assert (end - math.cos(1.0)).abs().max() < 0.1
    except SolverError as said:
        assert "t=" in str(said) and "loosen rtol=0.001 and atol=0.001" in str(said)
        assert rate >= 1e4
    assert time.process_time() - began < 10  # of a busy machine; alone it takes about 1


def test_max_evaluations_is_a_bound():
    with pytest.raises(SolverError, match=r"max_evaluations=50 do not suffice: after 4\d sample"):
        integrate(Cubic(), states(3) / 20, SPAN, Adaptive(1e-4, 1e-4, max_evaluations=50), seed=0)


@pytest.mark.parametrize("x_0", [1.5, 4.0])
def test_a_solution_that_runs_off_names_the_time(x_0):
    with pytest.raises((SolverError, NonFiniteError), match="sample 1 ") as said:
        integrate(Bursts(), torch.tensor([[0.1], [x_0]]).double(), SPAN, Adaptive())
    assert f"t={1 / x_0:.5g}"[:6] in str(said.value)


def test_steps_below_dt_min_name_the_time():
    solver = Adaptive(1e-4, 1e-4, dt_min=1e-2)
    with pytest.raises(SolverError, match=r"sample \d needs steps below 0.0\d+ at t=0.*dt_min"):
        integrate(Elementwise(), states(3), SPAN, solver, seed=0)


def test_a_drift_that_is_not_finite_names_sample_time_and_step():
    x = torch.tensor([[5.0], [-5.0], [5.0]]).double()
    with pytest.raises(NonFiniteError, match=r"sample 1 is not finite at t=0.(59|6).*step \d+ \("):
        integrate(BreaksAt(), x, SPAN, Adaptive(0.1, 0.1), seed=0)
    with pytest.raises(NonFiniteError, match=r"sample 1 is not finite at t=0.7, in its step 1 \("):
        integrate(BreaksAt(), x, [0.7, 1.0], Adaptive(0.1, 0.1), seed=0)
    # A sample that is done may stand where the drift is infinite.
    assert integrate(BreaksAt(), x, [0.0, 0.6], Adaptive(0.1, 0.1), seed=0).x.isfinite().all()


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (lambda t, s: torch.zeros(3, 2), "cannot be asked at times that each sample chooses"),
        (BrownianPath(0, (3, 2), [0.0, 0.5, 1.0]), r"noise=BrownianTree\(seed, shape, T\)"),
        (BrownianTree(0, (3, 1)), r"a BrownianTree of shape \(3, 1\).*needs \(3, 2\)"),
        (BrownianTree(0, (3, 2), 0.5), r"T = 0.5"),
    ],
    ids=["function", "path", "shape", "short"],
)
def test_noise_that_is_no_tree_is_refused_before_the_first_evaluation(noise, message):
    class Never(Decay):
        def drift(self, x, t):
            raise AssertionError("evaluated")

    with pytest.raises(ArgumentError, match=message):
        integrate(Never(), torch.zeros(3, 2).double(), SPAN, Adaptive(), noise=noise)


class OneTime(Decay):
    """A drift that multiplies by t as it is."""

    def drift(self, x, t):
        return -x * t


@pytest.mark.parametrize("shape", [(3, 2), (3, 3), (3, 1)], ids=str)
def test_a_process_that_takes_one_time_only_is_told_of_it(shape):
    with pytest.raises(ShapeError, match=r"drift\(x, t\) .* t of shape \(3,\): t is one time a"):
        integrate(OneTime(), torch.rand(shape).double() + 1, [0.5, 1.0], Adaptive(), seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rtol": 0}, r"rtol=0 must be in \(0, 1\)"),
        ({"atol": math.nan}, r"atol=nan must be in \(0, 1\)"),
        ({"max_evaluations": 0}, "max_evaluations=0 must be at least 1"),
        ({"dt_min": -1.0}, "dt_min=-1.0 must be a length of time"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_by_name(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        Adaptive(**arguments)


def test_a_grid_finer_than_the_tree_is_refused():
    with pytest.raises(GridError, match="ts has steps of 1e-09, below the shortest .*5.96e-08"):
        integrate(Decay(), states(2), [0.0, 1e-9, 1.0], Adaptive(), seed=0)


def test_it_is_registered_under_its_name():
    assert get("solver", "adaptive", rtol=0.1) == Adaptive(rtol=0.1)


def test_a_known_ou_run_down_agrees_with_small_steps_on_the_same_path():
    sde = OU(theta=1.5, volatility=0.7, T=1.0)
    data = GaussianData(sde, torch.tensor([0.5]).double(), torch.tensor([0.3]).double())
    process, tree = ReverseSDE(sde, data, 1.0), BrownianTree(4, (50, 1))
    x = states(50)[:, :1]
    fine = integrate(process, x, torch.linspace(1, 0.1, 513).double(), EulerMaruyama(), noise=tree)
    own = integrate(process, x, [1.0, 0.1], Adaptive(1e-3, 1e-3), noise=tree)
    assert (own.x - fine.x).abs().max() < 3e-2 * float(x.abs().max())
