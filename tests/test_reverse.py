"""ReverseSDE: every eta has the marginals of the forward SDE, state-dependent noise included."""

import math
import types
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd.functional import jacobian, jvp
from ztest import LIMIT, z_of_mean, z_of_variance

from sdeflow import (
    EDM,
    GBM,
    SDE,
    VE,
    VP,
    ArgumentError,
    Denoiser,
    EulerMaruyama,
    Heun,
    PairingError,
    RectifiedFlow,
    ReverseSDE,
    integrate,
    probability_flow,
    reverse,
    tweedie,
)
from sdeflow.denoiser import PREDICTIONS
from sdeflow.grid import log_snr
from sdeflow.testing import GaussianData, output_law

etas = st.floats(0, 1)
fractions = st.floats(0.01, 0.99)
f64 = partial(torch.tensor, dtype=torch.float64)
MEAN, STD = 0.2, 0.4  # of log x_0, for geometric Brownian motion


def log_law(t):
    """Mean and variance of log x_t under GBM, from log x_0 ~ N(MEAN, STD^2)."""
    return MEAN + (GBM().mu - GBM().volatility ** 2 / 2) * t, STD**2 + GBM().volatility ** 2 * t


def gbm_score(x, t):
    """grad log p_t of the lognormal law of x_t."""
    mean, variance = log_law(t)
    return -(1 + (x.log() - mean) / variance) / x


class Dropped(GBM):
    """A planted fault: the divergence of the state-dependent noise is left out."""

    def divergence(self, x, t):
        return torch.zeros_like(x)


class WrongSign(ReverseSDE):
    """A planted fault: x_{t-h} = x_t + [f - g^2 s] h + ..., as popular articles print it."""

    def drift(self, x, t):
        return -super().drift(x, t)


def gaussian_data(sde, mean=0.7, variance=0.25):
    return GaussianData(sde, f64([mean]), f64([variance]))


# ---- Gaussian data: exact


@given(etas, fractions, st.floats(-3, 3), st.floats(0, 4))
def test_every_eta_has_the_moment_equations_of_the_marginals(sde, eta, fraction, mean, variance):
    """Down in time with drift A x + b and noise eta g: dm/dt = A m + b and
    dV/dt = 2 A V - eta^2 g^2, for the law N(alpha m, alpha^2 v + sigma^2) of Gaussian data."""
    t, data = f64(fraction * sde.T), gaussian_data(sde, mean, variance)
    for score in (data, data.__call__):  # by the denoiser, by the score
        process = reverse(sde, score, eta)
        ends = process.drift(f64([[0.0], [1.0]]), t).squeeze(1)
        slope, offset = ends[1] - ends[0], ends[0]
        noise = (process.diffusion(torch.ones(1, 1).double(), t) ** 2).squeeze()
        m, v = data.law(t)
        dm, dv = (jvp(lambda u, k=k: data.law(u)[k], t, torch.ones_like(t))[1] for k in (0, 1))
        scale = float(slope.abs() * v + noise + slope.abs() * m.abs() + offset.abs())
        assert float(slope * m + offset - dm) == pytest.approx(0, abs=1e-9 * scale)
        assert float(2 * slope * v - noise - dv) == pytest.approx(0, abs=1e-9 * scale)


def test_the_wrong_sign_is_far_off_and_the_right_one_is_not():
    """Output law on N(0.7, 0.25) after 100 steps, computed exactly; Euler-Maruyama errs by O(h)."""
    sde = VP()
    data, ts = gaussian_data(sde), log_snr(sde, 100)
    start = data.law(ts[0])
    mean, variance = output_law(reverse(sde, data), ts, EulerMaruyama(), *start)
    assert float(mean) == pytest.approx(0.7, abs=0.03)
    assert float(variance) == pytest.approx(0.25, rel=0.1)
    mean, variance = output_law(WrongSign(sde, data), ts, EulerMaruyama(), *start)
    assert float(variance) > 10


@pytest.mark.parametrize("prediction", PREDICTIONS)
@given(eta=etas, fraction=fractions)
def test_a_denoiser_and_its_score_make_one_drift(sde, prediction, eta, fraction):
    denoiser = Denoiser(lambda x, t: torch.sin(3 * x), sde, prediction)
    t, x = f64(fraction * sde.T), torch.randn(4, 3, dtype=torch.float64)
    direct = reverse(sde, denoiser, eta).drift(x, t)
    by_score = reverse(sde, lambda x, t: denoiser(x, t), eta).drift(x, t)
    terms = sde.drift(x, t).abs() + sde.diffusion(x, t) ** 2 * denoiser(x, t).abs()
    assert ((direct - by_score).abs() <= 1e-10 * terms.max()).all()


def test_the_flow_of_a_denoiser_is_finite_where_alpha_vanishes():
    denoiser = Denoiser(lambda x, t: torch.sin(x), RectifiedFlow(), "velocity")
    x = torch.randn(3, 2, dtype=torch.float64)
    for t in (1.0, torch.ones(3).double()):
        flow = probability_flow(RectifiedFlow(), denoiser).drift(x, torch.as_tensor(t).double())
        torch.testing.assert_close(flow, torch.sin(x))


@given(fractions)
def test_tweedie_of_the_exact_score_is_the_exact_denoiser(sde, fraction):
    data, x = gaussian_data(sde), torch.randn(5, 1, dtype=torch.float64)
    t = fraction * sde.T
    expected = data.denoise(x, f64(t))
    tolerance = 1e-12 * float(1 + torch.exp(-sde.log_snr(f64(t))))
    found = tweedie(sde, data.__call__, x, t)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    found = reverse(sde, data.__call__).denoise(x, torch.full((5,), t, dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


# ---- noise that depends on the state


def fokker_planck_residual(process, x, t):
    """d_t p + d_x(b p) + eta^2/2 d_x^2(g^2 p) over p, for p the law of GBM at time t."""

    def density(x, t):
        mean, variance = log_law(t)
        return torch.exp(-((x.log() - mean) ** 2) / (2 * variance)) / (x * variance.sqrt())

    def along(function):
        return lambda y: jvp(function, y, torch.ones_like(y), create_graph=True)[1]

    time = t.expand_as(x)
    change = jvp(lambda u: density(x, u), time, torch.ones_like(time))[1]
    flow = along(lambda y: process.drift(y, t) * density(y, t))(x)
    spread = along(along(lambda y: process.diffusion(y, t) ** 2 * density(y, t)))(x)
    return (change + flow + spread / 2) / density(x, t)


@given(etas, fractions)
def test_every_eta_solves_the_fokker_planck_equation_of_gbm(eta, fraction):
    x = torch.linspace(0.3, 4, 40, dtype=torch.float64)[:, None]
    t = f64(fraction)
    assert fokker_planck_residual(reverse(GBM(), gbm_score, eta), x, t).abs().max() < 1e-9
    # The planted fault: without the divergence it does not hold.
    assert fokker_planck_residual(reverse(Dropped(), gbm_score, eta), x, t).abs().max() > 0.01


def z_scores_of_reversed(sde):
    """z of the mean and of the variance of log x_0, reversed from the exact law of x_T."""
    mean, variance = log_law(f64(1.0))
    x = torch.exp(mean + variance.sqrt() * torch.randn(20_000, 1, dtype=torch.float64))
    grid = torch.linspace(1, 0, 201, dtype=torch.float64)
    log_x = integrate(reverse(sde, gbm_score), x, grid, EulerMaruyama(), seed=1).x.log()
    return z_of_mean(log_x, MEAN), z_of_variance(log_x, STD**2)


def test_reversed_gbm_has_the_right_marginal():
    """Two z-tests, each with a false-alarm rate below 1e-6. The bias of 200 steps is below half a
    standard error (0.003 of the mean). Without the divergence the mean is -0.106 for 0.2."""
    mean, variance = z_scores_of_reversed(GBM())
    assert abs(mean) < LIMIT and abs(variance) < LIMIT
    assert abs(z_scores_of_reversed(Dropped())[0]) > 10 * LIMIT


def test_the_probability_flow_of_gbm_is_the_map_of_quantiles():
    """(log x_0 - m_0)/s_0 = (log x_T - m_T)/s_T, to the order of Heun; a fault is at 0.1."""
    mean, variance = log_law(f64(1.0))
    x = torch.linspace(0.3, 4, 40, dtype=torch.float64)[:, None]
    expected = MEAN + STD * (x.log() - mean) / variance.sqrt()

    def worst(sde, n):
        grid = torch.linspace(1, 0, n + 1, dtype=torch.float64)
        log_x = integrate(probability_flow(sde, gbm_score), x, grid, Heun()).x.log()
        return float((log_x - expected).abs().max())

    assert worst(GBM(), 80) < 1e-4
    assert worst(GBM(), 40) / worst(GBM(), 80) == pytest.approx(4, rel=0.1)
    assert worst(Dropped(), 80) > 0.1


class Reversible(SDE):
    """f = (div(G G^T) - G G^T x)/2 for a matrix G(x): reversible, with the law N(0, I)."""

    noise = "matrix"

    def diffusion(self, x, t):
        flat = x.flatten(1)
        rows = torch.stack((1 + 0.3 * flat.sin(), 0.5 * flat.roll(1, 1), 0.2 * flat**2), -1)
        return rows.reshape(*x.shape, 3)

    def gram(self, x):
        g = self.diffusion(x[None], None)[0].flatten(0, -2)
        return g @ g.T

    def drift(self, x, t):
        made = []
        for sample in x:
            jac = jacobian(self.gram, sample).flatten(2)
            pull = (self.gram(sample) @ sample.flatten()).reshape(sample.shape)
            made.append((jac.diagonal(dim1=1, dim2=2).sum(1).reshape(sample.shape) - pull) / 2)
        return torch.stack(made)


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 2, 1)], ids=str)
def test_a_reversible_diffusion_reversed_is_itself(shape):
    """At its own law the probability flow stands still and the reverse SDE is the forward one."""
    sde, t = Reversible(), f64(0.5)
    x = torch.randn(shape, dtype=torch.float64)
    score = -x
    flow = probability_flow(sde, lambda x, t: score).drift(x, t)
    torch.testing.assert_close(flow, torch.zeros_like(x), rtol=0, atol=1e-12)
    process = reverse(sde, lambda x, t: score)
    torch.testing.assert_close(process.drift(x, t), -sde.drift(x, t))
    assert process.noise_shape(x) == (shape[0], 3)
    torch.testing.assert_close(process.diffusion(x, t), sde.diffusion(x, t))


# ---- what a process says of itself


@given(etas)
def test_eta_scales_the_standard_deviation(eta):
    x, t = torch.rand(3, 2, dtype=torch.float64), f64(0.5)
    process = reverse(GBM(), gbm_score, eta)
    torch.testing.assert_close(process.diffusion(x, t), eta * 0.5 * x)
    torch.testing.assert_close(process.divergence(x, t), eta**2 * 2 * 0.25 * x)
    assert process.direction == (-1 if eta else 0)
    assert process.deterministic == (eta == 0)


def test_a_process_takes_its_range_and_noise_from_the_forward_sde():
    process = reverse(EDM(), gaussian_data(EDM()))
    assert (process.T, process.noise, process.additive) == (80.0, "elementwise", True)
    assert not reverse(GBM(), gbm_score).additive
    assert reverse(Reversible(), gbm_score).noise == "matrix"
    assert process.gaussian == EDM() and process.denoises
    assert process.with_score(gbm_score) == replace(process, score=gbm_score)


@pytest.mark.parametrize("eta", [-0.1, 1.5, True, False, math.nan, "1", None, [1.0]], ids=repr)
def test_eta_is_a_number_from_zero_to_one(eta):
    with pytest.raises(ArgumentError, match=r"eta=.* must be in \[0, 1\]: 0 is the ODE"):
        ReverseSDE(VP(), gbm_score, eta)


@pytest.mark.parametrize(
    "sde",
    [VP, "vp", None, reverse(VP(), gbm_score)],
    ids=["class", "name", "None", "reverse"],
)
def test_only_a_forward_sde_can_be_reversed(sde):
    with pytest.raises(ArgumentError, match=r"sde=.* must be a forward SDE, such as VP\(\)"):
        reverse(sde, gbm_score)


def test_a_score_is_callable():
    with pytest.raises(ArgumentError, match=r"score=3 must be callable as score\(x, t\)"):
        reverse(VP(), 3)


def test_a_denoiser_without_a_score_needs_a_gaussian_kernel():
    only_denoises = types.SimpleNamespace(denoise=lambda x, t: x)
    assert reverse(VP(), only_denoises).denoises
    with pytest.raises(ArgumentError, match=r"only denoises, and GBM has no Gaussian kernel"):
        reverse(GBM(), only_denoises)


def test_a_denoiser_made_for_another_sde_is_refused():
    with pytest.raises(PairingError, match=r"made for VE\(.*runs VP\(.*the same SDE"):
        reverse(VP(), Denoiser(gbm_score, VE()))


def test_tweedie_needs_a_gaussian_kernel():
    with pytest.raises(PairingError, match="GBM has no Gaussian kernel"):
        reverse(GBM(), gbm_score).denoise(torch.ones(2, 1), 0.5)


def test_matrix_noise_drives_a_state_of_one_number():
    """dx = x dw_1 + 2 x dw_2 on x of shape (B,): G G^T = 5 x^2, its divergence 10 x."""

    class Scalar(SDE):
        noise = "matrix"

        def drift(self, x, t):
            return 0 * x

        def diffusion(self, x, t):
            return torch.stack((x, 2 * x), -1)

    x, t = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64), torch.tensor(0.5)
    torch.testing.assert_close(Scalar().covariance_product(x, t, x), 5 * x**3)
    torch.testing.assert_close(Scalar().divergence(x, t), 10 * x)
    torch.testing.assert_close(Scalar().spread(x, t, torch.ones(3, 2).double()), 3 * x)
