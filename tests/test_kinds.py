"""Every kind of noise, in both calculi: what follows from drift and diffusion, by brute force."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kinds import KINDS, TIME, Smooth, full, seeds, shapes, start
from torch.func import jacrev
from ztest import LIMIT, z_of_mean

from sdeflow import (
    GBM,
    SDE,
    VP,
    ArgumentError,
    EulerMaruyama,
    Hutchinson,
    StepSolver,
    integrate,
    probability_flow,
    reverse,
)
from sdeflow.calculus import Converted, correction, in_calculus, ito_drift


def brute(sde, x):
    """(div(G G^T), 1/2 sum_k (dg_k) g_k) of the batch x from full Jacobians."""
    flat = x.reshape(len(x), sde.d)
    g = torch.stack([full(sde, each) for each in flat])
    jac = torch.stack([jacrev(lambda y: full(sde, y))(each) for each in flat])  # (B, d, m, d)
    moved = torch.einsum("bikj,bjk->bi", jac, g)
    spread = torch.einsum("bik,bjkj->bi", g, jac)
    return (moved + spread).reshape(x.shape), moved.reshape(x.shape) / 2


# ---- the two sums over derivatives


@given(st.sampled_from(KINDS), shapes, seeds)
def test_divergence_and_correction_are_those_of_the_full_jacobian(kind, shape, seed):
    sde = Smooth(kind, shape, seed)
    x = start(sde)
    divergence, moved = brute(sde, x)
    torch.testing.assert_close(sde.divergence(x, TIME), divergence, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(correction(sde, x, TIME), moved, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradients_are_left_behind_and_none_are_lost(kind):
    sde = Smooth(kind, (2, 2), 1)
    x = start(sde)
    for function in (sde.divergence, lambda x, t: correction(sde, x, t)):
        with torch.no_grad():
            plain = function(x, TIME)
        assert not plain.requires_grad and not function(x, TIME).requires_grad
        kept = function(x.clone().requires_grad_(), TIME)
        torch.testing.assert_close(kept.detach(), plain)
        if kind != "constant":
            assert kept.requires_grad
            y = x.clone().requires_grad_()
            assert torch.autograd.gradcheck(lambda y, f=function: f(y, TIME), y)


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_parameters_of_a_diffusion_get_their_gradients(kind):
    """Of the divergence and of the correction, at states that ask for none."""
    sde = Smooth(kind, (2,), 1)
    x, phase = start(sde), sde.phase

    for function in (lambda: sde.divergence(x, TIME), lambda: correction(sde, x, TIME)):

        def of_phase(p, function=function):
            sde.phase = p
            return function()

        assert torch.autograd.gradcheck(of_phase, phase.clone().requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (2,), (2, 2)], ids=str)
def test_an_empty_batch_is_a_batch(kind, shape):
    sde = Smooth(kind, shape, 0)
    x = torch.zeros(0, *shape, dtype=torch.float64)
    z = torch.zeros(sde.noise_shape(x), dtype=torch.float64)
    for made in (
        sde.spread(x, TIME, z),
        sde.covariance_product(x, TIME, x),
        sde.divergence(x, TIME),
        correction(sde, x, TIME),
    ):
        assert made.shape == x.shape


# ---- the other methods of an SDE


@given(st.sampled_from(KINDS), shapes, seeds)
def test_spread_and_covariance_product_are_those_of_the_full_matrix(kind, shape, seed):
    sde = Smooth(kind, shape, seed)
    x, v = start(sde), start(sde)
    z = torch.randn(sde.noise_shape(x), dtype=torch.float64)
    g = torch.stack([full(sde, each) for each in x.reshape(3, sde.d)])
    expected = torch.einsum("bik,bk->bi", g, z.reshape(3, -1)).reshape(x.shape)
    torch.testing.assert_close(sde.spread(x, TIME, z), expected)
    expected = torch.einsum("bik,bjk,bj->bi", g, g, v.reshape(3, -1)).reshape(x.shape)
    torch.testing.assert_close(sde.covariance_product(x, TIME, v), expected)


def test_scalar_noise_is_one_number_a_sample():
    class Common(SDE):
        noise = "scalar"

        def drift(self, x, t):
            return 0 * x

        def diffusion(self, x, t):
            return torch.tensor(2.0, dtype=torch.float64)

    x = torch.zeros(5, 3, 2)
    sde = Common()
    assert sde.noise_shape(x) == (5, 1)
    moved = integrate(sde, x, [0.0, 1.0], EulerMaruyama(), seed=1).x
    assert moved.dtype == x.dtype and moved.shape == x.shape
    assert (moved == moved[:, :1, :1]).all() and len(moved.unique()) == 5
    ones = torch.ones_like(x)
    torch.testing.assert_close(sde.covariance_product(x, TIME, ones), 24 * ones)


@pytest.mark.parametrize("name", ["noise", "calculus"])
def test_a_misspelt_kind_is_refused_when_the_class_is_made(name):
    with pytest.raises(ArgumentError, match=rf"Mine.{name}='Ito matrix' is unknown.*there are: "):
        type("Mine", (SDE,), {name: "Ito matrix"})


# ---- Ito and Stratonovich


class StratonovichGBM(SDE):
    """dx = mu x dt + volatility x o dw: its mean grows at the rate mu + volatility^2/2."""

    calculus = "stratonovich"
    mu, volatility = 0.1, 0.8

    def drift(self, x, t):
        return self.mu * x

    def diffusion(self, x, t):
        return self.volatility * x


class ScalarStratonovichGBM(StratonovichGBM):
    noise = "scalar"


class MatrixStratonovichGBM(StratonovichGBM):
    """The same law by two Wiener processes, of which each moves both components."""

    noise = "matrix"

    def diffusion(self, x, t):
        return self.volatility * x.unsqueeze(-1) * torch.tensor([0.6, 0.8], dtype=x.dtype)


MEANS = [StratonovichGBM, ScalarStratonovichGBM, MatrixStratonovichGBM]


def final_mean(sde, solver=None):
    x = torch.ones(20_000, 2, dtype=torch.float64)
    ts = torch.linspace(0, 1, 101)
    return integrate(sde, x, ts, solver or EulerMaruyama(), seed=5).x[:, 0]


@pytest.mark.parametrize("kind", MEANS)
def test_euler_maruyama_finds_the_mean_of_a_stratonovich_sde(kind):
    end, mean = final_mean(kind()), math.exp(kind.mu + kind.volatility**2 / 2)
    assert abs(z_of_mean(end, mean)) < LIMIT


@pytest.mark.parametrize("kind", MEANS)
def test_a_stratonovich_drift_taken_for_ito_is_caught(kind):
    wrong = type("Wrong", (kind,), {"calculus": "ito"})
    mean = math.exp(kind.mu + kind.volatility**2 / 2)
    assert abs(z_of_mean(final_mean(wrong()), mean)) > 4 * LIMIT


class EulerHeun(StepSolver):
    """The plainest Stratonovich method: Euler's drift, the noise averaged over a predictor."""

    calculus = "stratonovich"

    def step(self, process, x, t, s, noise, memory):
        h = s - t
        z = h.abs().sqrt() * noise(t, s)
        kick = process.spread(x, t, z)
        mean = (kick + process.spread(x + kick, s, z)) / 2
        return x + h * process.drift(x, t) + mean, None


def test_a_stratonovich_solver_gets_the_stratonovich_drift_of_an_ito_sde():
    end = final_mean(GBM(0.3, 0.8), EulerHeun())
    assert abs(z_of_mean(end, math.exp(0.3))) < LIMIT
    EulerHeun.calculus = "ito"
    try:
        assert abs(z_of_mean(final_mean(GBM(0.3, 0.8), EulerHeun()), math.exp(0.3))) > 4 * LIMIT
    finally:
        EulerHeun.calculus = "stratonovich"


def test_conversion_is_by_the_correction_with_the_sign_of_the_direction():
    """GBM has c = volatility^2 x / 2; in reverse, where it is eta^2 as large, it is added."""
    x = torch.rand(3, 2, dtype=torch.float64)
    ito, eta = GBM(0.3, 0.8), 0.5
    c = 0.32 * x
    torch.testing.assert_close(in_calculus(ito, "stratonovich").drift(x, TIME), 0.3 * x - c)
    process = reverse(ito, lambda x, t: -x, eta)
    there = in_calculus(process, "stratonovich")
    torch.testing.assert_close(there.drift(x, TIME), process.drift(x, TIME) + eta**2 * c)


@given(st.sampled_from(KINDS), shapes, seeds, st.sampled_from((0.5, 1.0)))
def test_there_and_back_is_the_process_itself(kind, shape, seed, eta):
    sde = Smooth(kind, shape, seed)
    x = start(sde)
    for process in (sde, reverse(sde, lambda x, t: -x, eta)):
        there = in_calculus(process, "stratonovich")
        assert there.calculus == "stratonovich" and process.calculus == "ito"
        back = in_calculus(there, "ito")
        torch.testing.assert_close(back.drift(x, TIME), process.drift(x, TIME))
        torch.testing.assert_close(ito_drift(there, x, TIME), process.drift(x, TIME))
        for name in ("T", "noise", "additive", "commutative", "direction", "deterministic"):
            assert getattr(there, name) == getattr(process, name)
        z = torch.randn(there.noise_shape(x), dtype=torch.float64)
        for name in ("diffusion", "divergence"):
            torch.testing.assert_close(
                getattr(there, name)(x, TIME), getattr(process, name)(x, TIME)
            )
        torch.testing.assert_close(there.spread(x, TIME, z), process.spread(x, TIME, z))


def test_nothing_is_converted_where_the_calculi_agree():
    for process in (VP(), GBM(), probability_flow(GBM(), lambda x, t: -x)):
        assert in_calculus(process, "ito") is process
    assert in_calculus(VP(), "stratonovich") is not None
    for process in (VP(), probability_flow(StratonovichGBM(), lambda x, t: -x)):
        assert in_calculus(process, "stratonovich") is process


def test_a_converted_process_keeps_its_parameters_and_can_be_copied():
    there = in_calculus(GBM(0.3, 0.8), "stratonovich")
    assert isinstance(copy.copy(there), Converted)
    assert there.volatility == copy.deepcopy(there).volatility == 0.8
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = there.no_such_thing


def test_evaluations_of_a_converted_process_are_counted_once():
    x = torch.ones(2, 1, dtype=torch.float64)
    for process, ts in (
        (StratonovichGBM(), [0.0, 0.5, 1.0]),
        (reverse(StratonovichGBM(), lambda x, t: -x), [1.0, 0.5, 0.0]),
    ):
        for solver in (EulerMaruyama(), EulerHeun()):
            assert integrate(process, x, ts, solver, seed=0).nfe == 2


@given(st.sampled_from(KINDS), shapes, seeds)
def test_a_reverse_process_uses_the_ito_drift_of_a_stratonovich_forward(kind, shape, seed):
    sde = Smooth(kind, shape, seed)
    x = start(sde)
    other = type("Other", (Smooth,), {"calculus": "stratonovich"})(kind, shape, seed)
    other.drift = lambda x, t: sde.drift(x, t) - correction(sde, x, t)
    for eta in (0.0, 0.5, 1.0):
        made = reverse(other, lambda x, t: -x, eta)
        assert made.calculus == "ito"
        expected = reverse(sde, lambda x, t: -x, eta)
        torch.testing.assert_close(made.drift(x, TIME), expected.drift(x, TIME))


# ---- Hutchinson's estimate of the divergence


@pytest.mark.parametrize("kind", KINDS)
def test_hutchinson_is_unbiased_with_the_variance_it_states(kind):
    sde = Smooth(kind, (3,), 4)
    one = torch.randn(1, 3, dtype=torch.float64)
    exact = brute(sde, one)[0]
    estimates = Hutchinson(sde, probes=2, seed=1).divergence(one.expand(20_000, 3), TIME)

    def gram(x):
        g = full(sde, x)
        return g @ g.T

    jac = jacrev(gram)(one[0])  # d_k a_ij
    variance = (jac + jac.mT).square().triu(1).sum((1, 2)) / 2
    for i in range(3):
        if variance[i] < 1e-20:
            torch.testing.assert_close(estimates[:, i], exact[0, i].expand(20_000))
        else:
            assert abs(z_of_mean(estimates[:, i], exact[0, i])) < LIMIT
            assert float(estimates[:, i].var()) == pytest.approx(float(variance[i]), rel=0.1)


def test_hutchinson_is_exact_where_components_look_at_themselves():
    sde = Smooth("own", (2, 2), 3)
    x = start(sde)
    estimate = Hutchinson(sde).divergence(x, TIME)
    torch.testing.assert_close(estimate, sde.divergence(x, TIME))


def test_probes_are_a_function_of_seed_and_sample_alone():
    sde = Smooth("matrix", (3,), 4)
    x = start(sde, 8)
    one = Hutchinson(sde, 2, seed=1)
    made = one.divergence(x, TIME)
    assert (one.divergence(x, TIME) == made).all()
    torch.testing.assert_close(one.divergence(x[:3], TIME), made[:3], rtol=1e-12, atol=1e-12)
    assert (Hutchinson(sde, 2, seed=2).divergence(x, TIME) != made).any()


def test_reverse_processes_use_the_estimate():
    sde = Smooth("matrix", (3,), 4)
    x = start(sde)
    for process in (reverse, probability_flow):
        exact = process(sde, lambda x, t: -x)
        estimated = process(Hutchinson(sde, 3), lambda x, t: -x)
        weight = (1 + exact.eta**2) / 2
        by = exact.drift(x, TIME) - estimated.drift(x, TIME)
        wrong = Hutchinson(sde, 3).divergence(x, TIME) - sde.divergence(x, TIME)
        torch.testing.assert_close(by, weight * wrong)
        torch.testing.assert_close(exact.diffusion(x, TIME), estimated.diffusion(x, TIME))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((VP(),), "process=VP.* has additive noise, and no divergence to estimate"),
        ((reverse(GBM(), abs),), "process=ReverseSDE.* must be a forward SDE"),
        (("gbm",), "process='gbm' must be a forward SDE"),
        ((GBM(), 0), "probes=0 must be at least 1"),
        ((GBM(), 1, 0.5), "seed=0.5 must be a whole number"),
    ],
    ids=["additive", "reverse", "name", "probes", "seed"],
)
def test_hutchinson_refuses_by_name(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        Hutchinson(*arguments)
