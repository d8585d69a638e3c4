"""SDE and GaussianSDE: what follows from two methods, and the divergence of G G^T."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd.functional import jacobian, jvp

from sdeflow import EDM, SDE, VE, VP, ArgumentError, GaussianSDE, ShapeError
from sdeflow.sde import as_time

eta_values = st.floats(0, 1)
fractions = st.floats(0.001, 0.999)


def times(sde, n=200):
    """Random times between t_min and just below T, where alpha may vanish."""
    return sde.t_min + (0.999 * sde.T - sde.t_min) * torch.rand(n, dtype=torch.float64)


def slope(function, t):
    """The derivative, by another road than sdeflow's: each output sees its own time alone."""
    return jvp(function, t, torch.ones_like(t))[1]


class TwoMethods(GaussianSDE):
    """A user's SDE: alpha = 1/(1 + t), sigma = t/(1 + t), so that log-SNR = -2 log t."""

    T = 3.0

    def alpha(self, t):
        return 1 / (1 + t)

    def sigma(self, t):
        return t / (1 + t)


class Channels(GaussianSDE):
    """A user's elementwise SDE: each of three channels is forgotten at a rate of its own."""

    rates_of = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)

    def __init__(self, trailing):
        self.rate = self.rates_of.reshape(3, *[1] * trailing)

    def alpha(self, t):
        return torch.exp(-t[(..., *[None] * self.rate.ndim)] * self.rate)

    def sigma(self, t):
        return torch.sqrt(-torch.expm1(-2 * t[(..., *[None] * self.rate.ndim)] * self.rate))


# ---- GaussianSDE: everything from alpha and sigma


def test_closed_rates_equal_autograd_of_alpha_and_sigma(sde):
    t = times(sde)
    torch.testing.assert_close(sde.rates(t), GaussianSDE.rates(sde, t), rtol=1e-9, atol=0)


def test_slopes_are_derivatives(sde):
    for t in (times(sde), times(sde, 1)[0]):
        expected = slope(sde.alpha, t), slope(sde.sigma, t)
        torch.testing.assert_close(sde.slopes(t), expected, rtol=1e-12, atol=1e-12)


def test_the_kernel_solves_the_moment_equations_of_drift_and_diffusion(sde):
    """d alpha/dt = f alpha and d sigma^2/dt = 2 f sigma^2 + g^2."""
    t = times(sde)
    one = torch.ones(len(t), 1, dtype=torch.float64)
    f, g = sde.drift(one, t)[:, 0], (sde.diffusion(one, t) * one)[:, 0]
    a, s = sde.alpha(t), sde.sigma(t)
    torch.testing.assert_close(slope(sde.alpha, t), f * a, rtol=1e-9, atol=1e-12)
    grown = slope(lambda u: sde.sigma(u) ** 2, t)
    torch.testing.assert_close(grown, 2 * f * s**2 + g**2, rtol=1e-9, atol=1e-12)


def test_data_sit_at_time_zero(sde):
    zero = torch.zeros((), dtype=torch.float64)
    assert float(sde.alpha(zero)) == pytest.approx(1.0, abs=1e-15)
    assert float(sde.sigma(zero)) == 0.0
    assert float(sde.sigma(zero.float())) == 0.0
    assert float(sde.log_snr(zero)) == math.inf


def test_schedules_take_single_times_and_batches_alike(sde):
    t = times(sde, 5)
    for function in (sde.alpha, sde.sigma, sde.log_snr, lambda u: sde.rates(u)[0]):
        each = torch.stack([function(u) for u in t])
        assert each.shape == (5,)
        torch.testing.assert_close(function(t), each, rtol=1e-14, atol=0)


def test_log_snr_falls_and_its_inverse_finds_the_time(sde):
    t = times(sde).sort().values
    assert (sde.log_snr(t).diff() < 0).all()
    torch.testing.assert_close(sde.time_of_log_snr(sde.log_snr(t)), t, rtol=1e-9, atol=0)
    by_bisection = GaussianSDE.time_of_log_snr(sde, sde.log_snr(t))
    torch.testing.assert_close(by_bisection, t, rtol=1e-9, atol=0)


def test_bisection_resolves_times_near_zero():
    for sde in (VP(), VE(), EDM()):
        tiny = sde.T * 10.0 ** -torch.arange(1, 16, dtype=torch.float64)
        found = GaussianSDE.time_of_log_snr(sde, sde.log_snr(tiny))
        torch.testing.assert_close(found, tiny, rtol=1e-9, atol=0)


def test_two_methods_give_everything():
    sde, t, x = TwoMethods(), times(TwoMethods(), 4), torch.randn(4, 2, dtype=torch.float64)
    column = t[:, None]
    torch.testing.assert_close(sde.drift(x, t), -x / (1 + column))
    torch.testing.assert_close(sde.diffusion(x, t), (2 * column).sqrt() / (1 + column))
    torch.testing.assert_close(sde.log_snr(t), -2 * t.log())
    torch.testing.assert_close(sde.time_of_log_snr(sde.log_snr(t)), t)
    torch.testing.assert_close(sde.perturb(x, t, -x), x * (1 - column) / (1 + column))
    torch.testing.assert_close(sde.prior(x), 0.75 * x)
    torch.testing.assert_close(sde.prior(x, 1.0), 0.5 * x)
    mean, std = sde.posterior(x, x, t, t / 2)
    assert mean.shape == x.shape and (std > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_state_keeps_its_dtype(sde, dtype):
    x = torch.randn(3, 2, dtype=dtype)
    for t in (times(sde, 3), times(sde, 1)[0]):
        made = sde.perturb(x, t, x), sde.drift(x, t), *sde.posterior(x, x, t, t / 2), sde.prior(x)
        assert all((x * each).dtype == dtype for each in made)


# ---- elementwise schedules


@pytest.mark.parametrize("shape", [(3, 3), (5, 3), (3, 3, 2, 2), (5, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("batched", [True, False], ids=["times", "time"])
def test_channels_with_schedules_of_their_own_are_separate_sdes(shape, batched):
    both = Channels(len(shape) - 2)
    x, z = torch.randn(2, *shape, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, shape[0], dtype=torch.float64)
    t = t if batched else t[0]
    noisy = both.perturb(x, t, z)
    mean, std = both.posterior(noisy, x, t, t / 2, 0.7)
    for c, rate in enumerate(Channels.rates_of):
        one, each = Channels(0), (slice(None), slice(c, c + 1))
        one.rate = rate
        torch.testing.assert_close(noisy[each], one.perturb(x[each], t, z[each]))
        torch.testing.assert_close(both.drift(x, t)[each], one.drift(x[each], t))
        g = (both.diffusion(x, t) * z)[each]
        torch.testing.assert_close(g, one.diffusion(x[each], t) * z[each])
        expected = one.posterior(noisy[each], x[each], t, t / 2, 0.7)
        torch.testing.assert_close(mean[each], expected[0])
        torch.testing.assert_close((std * z)[each], expected[1] * z[each])


# ---- perturb and posterior


@given(fractions, fractions, eta_values)
def test_posterior_after_perturb_is_the_marginal_for_every_eta(sde, high, low, eta):
    """x_t = alpha_t x_0 + sigma_t eps put into the mean m = A x_0 + C x_t must give
    A + C alpha_t = alpha_s and C^2 sigma_t^2 + std^2 = sigma_s^2."""
    high, low = max(high, low), min(high, low)
    t, s = (torch.tensor(sde.T * u, dtype=torch.float64) for u in (high, 0.9 * low))
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    of_data, std = sde.posterior(zero, one, t, s, eta)
    of_state, _ = sde.posterior(one, zero, t, s, eta)
    a_t, s_t, a_s, s_s = sde.alpha(t), sde.sigma(t), sde.alpha(s), sde.sigma(s)
    assert float(of_data + of_state * a_t) == pytest.approx(float(a_s), rel=1e-11)
    assert float((of_state * s_t) ** 2 + std**2) == pytest.approx(float(s_s**2), rel=1e-11)


@given(fractions, fractions)
def test_the_posterior_of_vp_at_eta_one_is_that_of_ddpm(high, low):
    """Ho et al. (2020), eq. 7, with beta = 1 - (alpha_t/alpha_s)^2."""
    sde, high, low = VP(), max(high, low), min(high, low)
    t, s = (torch.tensor(u, dtype=torch.float64) for u in (high, 0.9 * low))
    x, x0 = torch.randn(2, 4, 3, dtype=torch.float64)
    bar_t, bar_s = sde.alpha(t) ** 2, sde.alpha(s) ** 2
    beta = 1 - bar_t / bar_s
    expected = (bar_s.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - bar_s) * x) / (1 - bar_t)
    mean, std = sde.posterior(x, x0, t, s)
    torch.testing.assert_close(mean, expected, rtol=1e-8, atol=1e-8)
    variance = float((1 - bar_s) / (1 - bar_t) * beta)
    assert float(std**2) == pytest.approx(variance, rel=1e-7)


@given(eta_values.filter(lambda eta: eta > 0.01))
def test_a_variance_exploding_posterior_is_noisy_where_the_usual_print_is_not(eta):
    sde = EDM()
    t, s = torch.tensor(2.0).double(), torch.tensor(1.5).double()
    usual = eta * sde.sigma(s) / sde.sigma(t) * (1 - (sde.alpha(t) / sde.alpha(s)) ** 2).sqrt()
    _, std = sde.posterior(torch.zeros(1, 1), torch.zeros(1, 1), t, s, eta)
    assert float(usual) == 0.0
    assert float(std) == pytest.approx(eta * 1.5 * math.sqrt(1 - (1.5 / 2) ** 2), rel=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_posterior_at_time_zero_is_the_data(sde, eta):
    x, x0 = torch.randn(2, 3, 2, dtype=torch.float64)
    mean, std = sde.posterior(x, x0, times(sde, 3), torch.zeros(3, dtype=torch.float64), eta)
    torch.testing.assert_close(mean, x0)
    assert (std == 0).all()


def test_noise_must_have_the_shape_of_the_data_and_times_that_of_the_batch():
    x = torch.zeros(4, 2)
    with pytest.raises(ShapeError, match=r"noise has shape \(4,\).*x0, \(4, 2\)"):
        VP().perturb(x, torch.tensor(0.5), torch.zeros(4))
    with pytest.raises(ShapeError, match=r"t has shape \(3,\); it must be \(\) or \(4,\)"):
        VP().perturb(x, torch.full((3,), 0.5), x)


@pytest.mark.parametrize("t", [-0.1, math.nan, math.inf])
def test_impossible_times_are_refused(t):
    with pytest.raises(ArgumentError, match=r"t=.* must be a finite time >= 0"):
        as_time(t)


def test_times_become_float64():
    assert as_time(0.1).dtype == as_time(1).dtype == as_time(torch.tensor(1)).dtype == torch.float64


# ---- any SDE: noise that depends on the state


class Noisy(SDE):
    """dx = g(x) dw for the g given."""

    def __init__(self, g):
        self.g = g

    def drift(self, x, t):
        return torch.zeros_like(x)

    def diffusion(self, x, t):
        return self.g(x)


class Matrix(Noisy):
    """The same with a matrix G(x) of shape (B, *, m)."""

    noise = "matrix"


mixing = torch.randn(6, 3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def three_columns(x):
    """G(x), (B, *, 3): each entry looks at all components of the state."""
    g = torch.sin(torch.einsum("imj,bj->bim", mixing, x.flatten(1)))
    return g.reshape(*x.shape, 3)


ELEMENTWISE = {
    "own component": lambda x: 1 + x**2,
    "one component more": lambda x: x + x.roll(1, 1),
    "the mean": lambda x: x.mean(tuple(range(1, x.ndim)), keepdim=True),
    "the middle one alone": lambda x: x.flatten(1)[:, 1:2].reshape(-1, *[1] * (x.ndim - 1)),
    "its two neighbours": lambda x: x.roll(1, 1) + x.roll(-1, 1),
    "a constant": lambda x: torch.full((1,), 0.3, dtype=x.dtype),
}


def divergence_by_jacobian(gram, x):
    """sum_j d_j a_ij, sample by sample, with a = gram(x) of shape (d, d)."""
    each = [jacobian(lambda y: gram(y[None]), sample).flatten(2) for sample in x]
    return torch.stack([j.diagonal(dim1=1, dim2=2).sum(1) for j in each]).reshape(x.shape)


@pytest.mark.parametrize("g", ELEMENTWISE.values(), ids=ELEMENTWISE)
@pytest.mark.parametrize("shape", [(4, 3), (1, 3), (2, 3, 2, 1)], ids=str)
def test_divergence_of_elementwise_noise_equals_the_jacobian(g, shape):
    x = torch.randn(shape, dtype=torch.float64)
    found = Noisy(g).divergence(x, torch.tensor(0.5))

    def gram(y):
        return torch.diag((g(y) * torch.ones_like(y)).flatten() ** 2)

    torch.testing.assert_close(found, divergence_by_jacobian(gram, x))


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 2, 1)], ids=str)
def test_divergence_of_matrix_noise_equals_the_jacobian(shape):
    x = torch.randn(shape, dtype=torch.float64)
    found = Matrix(three_columns).divergence(x, torch.tensor(0.5))

    def gram(y):
        g = three_columns(y).reshape(-1, 3)
        return g @ g.T

    torch.testing.assert_close(found, divergence_by_jacobian(gram, x))
    constant = Matrix(lambda y: torch.ones(*y.shape, 3, dtype=y.dtype))
    assert (constant.divergence(x, torch.tensor(0.5)) == 0).all()


@pytest.mark.parametrize("g", [lambda x: x * x.roll(1, 1), lambda x: 1 + x**2], ids=["far", "own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergence_does_not_depend_on_the_units_of_the_noise(g, dtype):
    x, t = torch.randn(4, 3, dtype=dtype), torch.tensor(0.5)
    small = Noisy(lambda y: 1e-3 * g(y)).divergence(x, t)
    torch.testing.assert_close(1e6 * small, Noisy(g).divergence(x, t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind, g", [(Noisy, ELEMENTWISE["the mean"]), (Matrix, three_columns)])
def test_divergence_is_the_same_without_gradients_and_differentiable_with_them(kind, g):
    sde, t = kind(g), torch.tensor(0.5)
    x = torch.randn(2, 6, dtype=torch.float64)
    with torch.no_grad():
        plain = sde.divergence(x, t)
    kept = sde.divergence(x.clone().requires_grad_(), t)
    assert not plain.requires_grad and kept.requires_grad
    torch.testing.assert_close(plain, kept.detach())
    assert torch.autograd.gradcheck(lambda y: sde.divergence(y, t), x.requires_grad_())


def test_additive_noise_has_no_divergence(sde):
    x = torch.randn(3, 2, dtype=torch.float64)
    assert (sde.divergence(x, torch.tensor(0.5)) == 0).all()


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 2, 1)], ids=str)
def test_matrix_noise_spreads_by_g_and_multiplies_by_its_gram(shape):
    sde, t = Matrix(three_columns), torch.tensor(0.5)
    x, v = torch.randn(2, *shape, dtype=torch.float64)
    assert sde.noise_shape(x) == (shape[0], 3)
    z = torch.randn(sde.noise_shape(x), dtype=torch.float64)
    g = three_columns(x).flatten(1, -2)
    spread = torch.einsum("bim,bm->bi", g, z).reshape(shape)
    torch.testing.assert_close(sde.spread(x, t, z), spread)
    product = torch.einsum("bim,bjm,bj->bi", g, g, v.flatten(1)).reshape(shape)
    torch.testing.assert_close(sde.covariance_product(x, t, v), product)


def test_elementwise_noise_spreads_each_component_alone():
    sde, t = Noisy(lambda x: 2 * x), torch.tensor(0.5)
    x, z = torch.randn(2, 2, 3, 2, 1, dtype=torch.float64)
    assert sde.noise_shape(x) == x.shape
    torch.testing.assert_close(sde.spread(x, t, z), 2 * x * z)
    torch.testing.assert_close(sde.covariance_product(x, t, z), 4 * x**2 * z)
