"""A traced solver is the plain loop, and what cannot be traced keeps its plain loop."""

import pytest
import torch
from sdeflow_plugins.solvers.ddim import DDIM
from sdeflow_plugins.solvers.ddpm import DDPM
from sdeflow_plugins.solvers.dpmpp import DPMpp1S, DPMpp2M, DPMpp2S

from sdeflow import (
    OU,
    VP,
    ArgumentError,
    Denoiser,
    EulerMaruyama,
    GaussianSDE,
    GridError,
    Heun,
    RectifiedFlow,
    ReverseSDE,
    StepSolver,
    integrate,
    probability_flow,
    reverse,
    trace,
)
from sdeflow.denoiser import PREDICTIONS
from sdeflow.grid import log_snr, uniform
from sdeflow.tableau import Draw, Evaluation

STEP_SOLVERS = (EulerMaruyama(), Heun(), DDIM(), DPMpp1S(), DPMpp2S(), DPMpp2M())
TS = log_snr(VP(), 8)


def net(x, t):
    return torch.tanh(x) + t.reshape(-1, *[1] * (x.ndim - 1)).cos()


def start(sde=None, ts=TS):
    return (sde or VP()).prior(torch.randn(4, 3, dtype=torch.float64), ts[0])


def both_roads(process, x, ts, solver):
    """(the traced run, the plain one): grad=True forces the plain loop."""
    return (integrate(process, x, ts, solver, seed=1, grad=plain) for plain in (False, True))


def assert_equal_to_rounding(fused, plain):
    assert (fused.x - plain.x).abs().max() <= 1e-12 * plain.x.abs().max()


# ---- the two roads


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("solver", STEP_SOLVERS, ids=repr)
def test_the_tableau_is_the_plain_loop(solver, prediction, sde):
    ts = log_snr(sde, 8, t_max=0.9 * sde.T)
    x = start(sde, ts)
    for eta in (0.0, 0.5, 1.0):
        process = ReverseSDE(sde, Denoiser(net, sde, prediction), eta)
        fused, plain = both_roads(process, x, ts, solver)
        assert fused.fused and not plain.fused
        assert fused.nfe == plain.nfe
        assert_equal_to_rounding(fused, plain)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_tableau_of_ddpm_is_the_plain_loop(sde, variance):
    ts = log_snr(sde, 8, t_max=0.9 * sde.T)
    process = reverse(sde, Denoiser(net, sde, "v"))
    fused, plain = both_roads(process, start(sde, ts), ts, DDPM(variance))
    assert fused.fused and not plain.fused
    assert_equal_to_rounding(fused, plain)


@pytest.mark.parametrize("solver", STEP_SOLVERS, ids=repr)
def test_scores_and_denoising_objects_are_traced_too(solver):
    class Guided:
        def denoise(self, x, t):
            return torch.tanh(x)

    def score(x, t):
        return (VP().alpha(t) * torch.tanh(x) - x) / VP().sigma(t) ** 2

    for asked in (score, Guided()):
        fused, plain = both_roads(reverse(VP(), asked), start(), TS, solver)
        assert fused.fused and not plain.fused
        assert_equal_to_rounding(fused, plain)


@pytest.mark.parametrize("solver", [s for s in STEP_SOLVERS if type(s) not in (Heun,)], ids=repr)
def test_the_roads_agree_to_the_end_at_zero(solver):
    ts = uniform(VP(), 6, to_zero=True)
    fused, plain = both_roads(reverse(VP(), Denoiser(net, VP(), "v")), start(), ts, solver)
    assert fused.fused
    assert_equal_to_rounding(fused, plain)


def test_the_tableau_of_ddim_has_the_closed_form():
    """x_s = (sigma_s/sigma_t) x + (alpha_s - alpha_t sigma_s/sigma_t) D at eta = 0."""
    tableau = trace(DDIM(), probability_flow(VP(), Denoiser(net, VP(), "data")), TS)
    a, s = VP().alpha(TS), VP().sigma(TS)
    assert tableau.evaluations == 8
    for k, row in enumerate(tableau.rows):
        ratio = s[k + 1] / s[k]
        expected = torch.stack((ratio, a[k + 1] - a[k] * ratio))
        assert [i for i, _ in row.state] == [0, 1]
        made = torch.tensor([c for _, c in row.state], dtype=torch.float64)
        torch.testing.assert_close(made, expected, rtol=1e-12, atol=0)
        assert [type(op) for op in row.operations] == [Evaluation]
    assert torch.equal(tableau.host_times, TS[:-1])


def test_a_stochastic_row_draws_over_its_own_interval():
    tableau = trace(DPMpp2S(), reverse(VP(), net), TS)
    for row in tableau.rows:
        draws = [op for op in row.operations if isinstance(op, Draw)]
        assert (draws[0].t, draws[-1].s) == (row.t, row.s)
        assert draws[0].s == draws[1].t


# ---- steps that are not linear


def step_with(change, remember=lambda x: None):
    """DDIM, its new state changed by `change`, its memory by `remember`."""

    class Changed(DDIM):
        def step(self, process, x, t, s, noise, memory):
            return change(super().step(process, x, t, s, noise, None)[0]), remember(x)

    return Changed()


class Box:
    """A memory that a trace cannot look into."""

    def __init__(self, x):
        self.x = x


NONLINEAR = {
    "method": lambda x: x.clamp(-1, 1),
    "function": torch.tanh,
    "norm": lambda x: x / torch.linalg.vector_norm(x).clamp(1),
    "branch": lambda x: x if x.sum() > 0 else 2 * x,
    "shape": lambda x: x * x.shape[0],
    "abs": abs,
    "power": lambda x: x**2,
    "product": lambda x: x * x,
    "quotient": lambda x: 1 / (3 + x),
    "index": lambda x: torch.stack((x[:, 0], x[:, 1], x[:, 2]), 1),
    "matrix": lambda x: x @ torch.ones(3, 3, dtype=x.dtype),
    "comparison": lambda x: torch.where(x > 0, x, 2 * x),
    "equality": lambda x: x + 1.0 * (x != 3),
    "length": lambda x: len(x) * x,
    "constant": lambda x: x + 1.0,
    "tensor": lambda x: x + torch.ones(3, dtype=x.dtype),
    "per component": lambda x: x * torch.arange(3.0, dtype=x.dtype),
    "isinstance": lambda x: x if isinstance(x, torch.Tensor) else x.impossible(),
}


@pytest.mark.parametrize("change", NONLINEAR.values(), ids=NONLINEAR)
def test_a_step_that_is_not_linear_keeps_the_plain_loop(change):
    process = reverse(VP(), Denoiser(net, VP(), "v"))
    chosen, plain = both_roads(process, start(), TS, step_with(change))
    assert not chosen.fused
    assert torch.equal(chosen.x, plain.x)
    linear, _ = both_roads(process, start(), TS, step_with(lambda x: x + 0 * x))
    assert linear.fused
    assert not torch.equal(chosen.x, linear.x)


class Averaging(StepSolver):
    """Mixes in the state before, held in a structure of choice."""

    order = 1

    def __init__(self, pack, unpack):
        self.pack, self.unpack = pack, unpack

    def step(self, process, x, t, s, noise, memory):
        before = x if memory is None else self.unpack(memory)
        mean, _ = process.gaussian.posterior(x, process.denoise(x, t), t, s, 0.0)
        return 0.9 * mean + 0.1 * before, self.pack(x)


MEMORIES = {
    # structure       pack, unpack, whether a trace looks into it
    "tensor": (lambda x: x, lambda m: m, True),
    "tuple": (lambda x: (x, 3), lambda m: m[0], True),
    "list": (lambda x: [2, [x]], lambda m: m[1][0], True),
    "dict": (lambda x: {"x": x, "n": 1}, lambda m: m["x"], True),
    "box": (Box, lambda m: m.x, False),
}


@pytest.mark.parametrize(("pack", "unpack", "seen"), MEMORIES.values(), ids=MEMORIES)
def test_a_memory_is_followed_or_left_to_the_plain_loop(pack, unpack, seen):
    process = probability_flow(VP(), Denoiser(net, VP(), "v"))
    chosen, plain = both_roads(process, start(), TS, Averaging(pack, unpack))
    assert chosen.fused == seen
    assert_equal_to_rounding(chosen, plain)


def test_a_step_that_asks_more_of_its_score_or_noise_keeps_the_plain_loop():
    class Score:
        gain = 1.1

        def denoise(self, x, t):
            return torch.tanh(x)

    class Curious(DDIM):
        def step(self, process, x, t, s, noise, memory):
            moved, _ = super().step(process, x, t, s, noise, memory)
            return moved * process.score.gain, None

    chosen, plain = both_roads(reverse(VP(), Score()), start(), TS, Curious())
    assert not chosen.fused
    assert torch.equal(chosen.x, plain.x)


def test_matrix_noise_elementwise_schedules_and_forward_sdes_are_not_traced():
    class PerComponent(GaussianSDE):
        def alpha(self, t):
            return torch.exp(-t[..., None] * torch.tensor([0.5, 1.0, 2.0]).double())

        def sigma(self, t):
            return torch.sqrt(1 - self.alpha(t) ** 2)

    sde = PerComponent()
    solution = integrate(reverse(sde, Denoiser(net, sde, "v")), start(), TS, DDIM(), seed=1)
    assert not solution.fused
    assert not integrate(OU(), start(), TS.flip(0), EulerMaruyama(), seed=1).fused


# ---- infinite coefficients


class Counting:
    calls = 0

    def __call__(self, x, t):
        self.calls += 1
        return x


INFINITE = {
    # case                               SDE, prediction, eta, solver, grid
    "noise at alpha = 0": (RectifiedFlow(), "noise", 0.0, DDIM(), {}),
    "reverse SDE at alpha = 0": (RectifiedFlow(), "velocity", 1.0, EulerMaruyama(), {}),
    "heun at alpha = 0": (RectifiedFlow(), "velocity", 0.5, Heun(), {}),
    "heun to sigma = 0": (VP(), "noise", 0.0, Heun(), {"to_zero": True}),
    "heun to sigma = 0, eta": (VP(), "v", 1.0, Heun(), {"to_zero": True}),
    "score at alpha = 0": (RectifiedFlow(), None, 0.0, DDIM(), {}),
}


@pytest.mark.parametrize("case", INFINITE.values(), ids=INFINITE)
def test_an_infinite_coefficient_is_refused_before_the_first_evaluation(case):
    sde, prediction, eta, solver, options = case
    score = Counting()
    whole = Denoiser(score, sde, prediction) if prediction else score
    with pytest.raises(GridError, match=r"step of \w+ from t=.* infinite coefficient .* t_min"):
        integrate(ReverseSDE(sde, whole, eta), start(), uniform(sde, 5, **options), solver)
    assert score.calls == 0


def test_the_same_ends_are_fine_where_the_coefficients_are_finite():
    flow = probability_flow(RectifiedFlow(), Denoiser(net, RectifiedFlow(), "velocity"))
    assert integrate(flow, start(), uniform(flow.forward, 5, to_zero=True), EulerMaruyama()).fused
    process = reverse(VP(), Denoiser(net, VP(), "noise"))
    assert integrate(process, start(), uniform(VP(), 5, to_zero=True), DDIM(), seed=1).fused


def test_an_error_of_the_step_itself_is_not_swallowed():
    class Wrong(DDIM):
        def step(self, process, x, t, s, noise, memory):
            raise ArgumentError("of the step")

    with pytest.raises(ArgumentError, match="of the step"):
        integrate(reverse(VP(), net), start(), TS, Wrong(), seed=1)
