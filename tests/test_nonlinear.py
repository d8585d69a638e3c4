"""The nonlinear SDEs: each closed form against drift and diffusion, or against a simulation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ztest import LIMIT, ks_excess, z_of_mean

from sdeflow import (
    CIR,
    GBM,
    SDE,
    ArgumentError,
    DoubleWell,
    EulerMaruyama,
    Heston,
    Lorenz,
    ShapeError,
    StudentT,
    get,
    integrate,
)

f64 = torch.float64
TIME = torch.tensor(0.4, dtype=f64)
SDES = {
    "gbm": GBM(0.3, 0.6),
    "cir": CIR(1.2, 0.8, 0.5),
    "heston": Heston(),
    "double_well": DoubleWell(0.5, 0.7),
    "student_t": StudentT(0.7, 1.3),
    "lorenz": Lorenz(),
}
every = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
ALL = st.sampled_from([sde for sde in SDES.values() if not isinstance(sde, Heston | Lorenz)])


def states(sde, n=5):
    shape = {Heston: (n, 2), Lorenz: (n, 3)}.get(type(sde), (n,))
    return 0.2 + torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=f64)


def slope(function, x):
    """d function/dx of what looks at its own entry alone."""
    if not x.requires_grad:
        x = x.clone().requires_grad_()
    y = function(x)
    if not y.requires_grad:
        return torch.zeros_like(x)
    found = torch.autograd.grad(y.sum(), x, create_graph=True, allow_unused=True)[0]
    return torch.zeros_like(x) if found is None else found


# ---- every one of them


@every
def test_closed_forms_of_the_divergence_and_the_covariance_are_those_of_the_diffusion(sde):
    x = states(sde)
    torch.testing.assert_close(sde.divergence(x, TIME), SDE.divergence(sde, x, TIME))
    product = SDE.covariance_product(sde, x, TIME, x + 1)
    torch.testing.assert_close(sde.covariance_product(x, TIME, x + 1), product)


@pytest.mark.parametrize("name", SDES)
def test_each_has_a_name_and_runs_forward_from_its_defaults(name):
    sde = get("sde", name)
    assert type(sde) is type(SDES[name])
    x = states(sde).float()
    end = integrate(sde, x, torch.linspace(0, sde.T, 1001), EulerMaruyama(), seed=0).x
    assert end.shape == x.shape and end.dtype == x.dtype and (end != x).any()
    assert integrate(sde, x[:0], [0.0, 0.5], EulerMaruyama(), seed=0).x.shape == x[:0].shape


@every
def test_a_forward_sde_takes_a_time_for_each_sample(sde):
    x, t = states(sde), torch.linspace(0.1, 0.5, 5, dtype=f64)
    for function in (sde.drift, sde.divergence, sde.diffusion):
        together = function(x, t)
        for i in range(5):
            alone = function(x[i : i + 1], t[i])
            torch.testing.assert_close(together[i : i + 1] if together.ndim else together, alone)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: GBM(volatility=-0.1), r"GBM\(.*: volatility=-0.1 must be > 0"),
        (lambda: GBM(mu=math.nan), "mu=nan must be a finite number"),
        (lambda: CIR(kappa=0), "kappa=0 must be > 0"),
        (lambda: CIR(T=math.inf), "T=inf must be a finite number"),
        (lambda: Heston(rho=1.5), r"rho=1.5 must be in \[-1, 1\]"),
        (lambda: Heston(theta="0.04"), "theta='0.04' must be a finite number"),
        (lambda: DoubleWell(temperature=0.0), "temperature=0.0 must be > 0"),
        (lambda: StudentT(scale=None), "scale=None must be a finite number"),
        (lambda: Lorenz(T=-1), "T=-1 must be > 0"),
    ],
    ids=range(9),
)
def test_parameters_are_checked_by_name(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


@pytest.mark.parametrize(
    "sde, shape, rule",
    [
        (Heston(), (4,), r"a state of Heston is \(B, 2\)"),
        (Heston(), (4, 2, 2), r"a state of Heston is \(B, 2\)"),
        (Lorenz(), (4, 2), r"a state of Lorenz is \(B, 3, \*\)"),
    ],
    ids=str,
)
def test_states_of_the_wrong_shape_are_refused(sde, shape, rule):
    with pytest.raises(ShapeError, match=rule):
        sde.drift(torch.zeros(shape), TIME)


def test_parameters_may_be_tensors_with_gradients():
    volatility = torch.tensor(0.5, requires_grad=True)
    price = GBM(0.1, volatility).moments(torch.ones(3), TIME)[1].sum()
    assert torch.autograd.grad(price, volatility)[0] > 0
    drawn = StudentT(scale=volatility).log_density(torch.ones(3), TIME, 0.2).sum()
    assert torch.autograd.grad(drawn, volatility)[0].isfinite()
    turned = GBM(0.1, volatility).divergence(torch.ones(3), TIME).sum()
    assert float(torch.autograd.grad(turned, volatility)[0]) == pytest.approx(4 * 0.5 * 3)


# ---- exact scores


def evolves(sde, score, x, t):
    """What is left of the equation that scores of an SDE solve, a = g^2:

    d s/dt = d/dx [ -f' - f s + ((a' + a s)' + (a' + a s) s)/2 ].
    """

    def inner(y):
        s = score(y, t)
        pull = slope(lambda z: sde.diffusion(z, t) ** 2 * torch.ones_like(z), y)
        pull = pull + sde.diffusion(y, t) ** 2 * s
        drift = sde.drift(y, t)
        # Both are graphs of y already.
        grown = torch.autograd.grad(pull.sum(), y, create_graph=True)[0]
        squeezed = torch.autograd.grad(drift.sum(), y, create_graph=True)[0]
        return -squeezed - drift * s + (grown + pull * s) / 2

    return float((slope(lambda u: score(x, u), t) - slope(inner, x)).detach())


SCORES = {
    "gbm": (SDES["gbm"], lambda x, t: SDES["gbm"].score(x, t, 0.3, 0.2)),
    "gbm from a point": (SDES["gbm"], lambda x, t: SDES["gbm"].score(x, t, 0.3)),
    "cir": (SDES["cir"], lambda x, t: SDES["cir"].score(x, t, 0.4)),
    "cir at rest": (SDES["cir"], SDES["cir"].score),
    "student_t": (SDES["student_t"], lambda x, t: SDES["student_t"].score(x, t, -0.4)),
    "student_t at rest": (SDES["student_t"], SDES["student_t"].score),
    "double_well at rest": (SDES["double_well"], SDES["double_well"].score),
}


@pytest.mark.parametrize("sde, score", SCORES.values(), ids=SCORES)
@given(st.floats(0.05, 3), st.floats(0.1, 2))
def test_scores_solve_the_score_equation(sde, score, x, t):
    x, t = torch.tensor([x], dtype=f64), torch.tensor([t], dtype=f64)
    off = evolves(sde, score, x, t)
    scale = 1 + float(score(x, t).abs() ** 3) + float(1 / t**3)
    assert abs(off) < 1e-10 * scale


@pytest.mark.parametrize("sde, score", SCORES.values(), ids=SCORES)
def test_the_score_equation_tells_a_score_that_is_one_per_cent_off(sde, score):
    x, t = torch.tensor([0.7], dtype=f64), torch.tensor([0.4], dtype=f64)
    assert abs(evolves(sde, lambda y, u: score(y, u) * 1.01, x, t)) > 1e-3


@given(st.floats(-30, 30), st.floats(0.01, 20), st.none() | st.floats(-10, 10))
def test_student_t_score_is_the_slope_of_the_log_density_and_that_of_the_cdf(x, t, x0):
    sde, x, t = SDES["student_t"], torch.tensor([x], dtype=f64), torch.tensor(t, dtype=f64)
    log_density = sde.log_density(x, t, x0)
    by_autograd = slope(lambda y: sde.log_density(y, t, x0), x)
    torch.testing.assert_close(sde.score(x, t, x0), by_autograd, rtol=1e-8, atol=1e-8)
    density = slope(lambda y: sde.cdf(y, t, x0), x)
    torch.testing.assert_close(log_density.exp(), density.detach(), rtol=1e-8, atol=1e-13)


def test_student_t_densities_do_not_underflow():
    sde, x = StudentT(), torch.tensor([-1e6, 1e6], dtype=f64)
    t = torch.tensor(1e-3, dtype=f64)
    assert sde.log_density(x, t, 0.0).isfinite().all()
    assert sde.score(x, t, 0.0).isfinite().all()


@given(st.floats(1e-6, 1 - 1e-6), st.floats(0.01, 20), st.none() | st.floats(-10, 10))
def test_student_t_quantiles_invert_the_cdf(p, t, x0):
    sde, t, p = SDES["student_t"], torch.tensor(t, dtype=f64), torch.tensor([p], dtype=f64)
    found = sde.cdf(sde.quantile(p, t, x0), t, x0)
    torch.testing.assert_close(found, p, rtol=0, atol=1e-12)


def test_student_t_forgets_its_start():
    sde, x = SDES["student_t"], torch.linspace(-5, 5, 11, dtype=f64)
    late = torch.tensor(30.0, dtype=f64)
    for function in (sde.cdf, sde.log_density, sde.score):
        torch.testing.assert_close(function(x, late, 2.0), function(x, late))


def test_double_well_score_is_that_of_its_potential():
    sde, x = SDES["double_well"], torch.linspace(-2, 2, 9, dtype=f64)
    expected = -slope(sde.potential, x) / sde.temperature
    torch.testing.assert_close(sde.score(x, TIME), expected.detach())
    torch.testing.assert_close(DoubleWell().drift(x, TIME), x - x**3)
    assert float(DoubleWell().diffusion(x, TIME)) == 1.0


# ---- moments and exact draws


@pytest.mark.parametrize("name", ["gbm", "cir"])
@given(st.floats(0.1, 3), st.floats(0.05, 2))
def test_moments_solve_their_equations(name, x0, t):
    """dm/dt = f(m) and dV/dt = 2 f' V + E[g^2], f being affine and g^2 quadratic."""
    sde, x0, t = SDES[name], torch.tensor([x0], dtype=f64), torch.tensor([t], dtype=f64)
    mean, variance = sde.moments(x0, t)
    square = (lambda m, v: 0.36 * (m**2 + v)) if name == "gbm" else (lambda m, v: 0.25 * m)
    rate = sde.drift(x0 + 1, t) - sde.drift(x0, t)
    torch.testing.assert_close(slope(lambda u: sde.moments(x0, u)[0], t), sde.drift(mean, t))
    grown = 2 * rate * variance + square(mean, variance)
    torch.testing.assert_close(slope(lambda u: sde.moments(x0, u)[1], t), grown)


def many(value, n=40_000):
    return torch.full((n,), value, dtype=f64)


def test_exact_draws_have_the_moments_of_the_transition():
    generator = torch.Generator().manual_seed(0)
    gbm, cir = SDES["gbm"], SDES["cir"]
    z = torch.randn(40_000, generator=generator, dtype=f64)
    for sde, drawn in (
        (gbm, gbm.perturb(many(1.5), TIME, z)),
        (cir, cir.draw(many(1.5), TIME, generator)),
    ):
        mean, variance = (float(each[0]) for each in sde.moments(many(1.5, 1), TIME))
        assert abs(z_of_mean(drawn, mean)) < LIMIT
        assert abs(z_of_mean((drawn - mean) ** 2, variance)) < LIMIT
        assert abs(z_of_mean(drawn * 1.1, mean)) > LIMIT


def test_gamma_laws_stay_gamma_under_cir():
    generator, sde = torch.Generator().manual_seed(1), SDES["cir"]
    x0 = 0.4 * torch._standard_gamma(many(sde.shape), generator=generator)
    x = sde.draw(x0, TIME, generator)
    uniform = torch.special.gammainc(many(sde.shape), x / sde.scale(TIME, 0.4))
    assert ks_excess(uniform) < 1
    assert ks_excess(torch.special.gammainc(many(sde.shape), x / 0.4)) > 1


@pytest.mark.parametrize("x0", [None, 1.5])
def test_euler_maruyama_finds_the_law_of_student_t(x0):
    sde, generator = SDES["student_t"], torch.Generator().manual_seed(2)
    p = torch.rand(20_000, generator=generator, dtype=f64)
    start = sde.quantile(p, TIME) if x0 is None else many(x0, 20_000)
    end = integrate(sde, start, torch.linspace(0, 0.4, 101, dtype=f64), EulerMaruyama(), seed=1).x
    assert ks_excess(sde.cdf(end, TIME, x0)) < 1
    assert ks_excess(sde.cdf(1.1 * end, TIME, x0)) > 1


def test_a_simulated_heston_price_is_a_martingale_with_the_mean_variance_and_correlation():
    sde = Heston(rho=-0.7)
    x0 = torch.tensor([[1.0, 0.09]], dtype=f64).expand(20_000, 2)
    ts = torch.linspace(0, 1, 101, dtype=f64)
    end = integrate(sde, x0, ts, EulerMaruyama(), seed=2).x
    expected = sde.mean(x0[:1], torch.tensor(1.0, dtype=f64))[0]
    for i in range(2):
        assert abs(z_of_mean(end[:, i], float(expected[i]))) < LIMIT
    assert float(torch.corrcoef(end.T)[0, 1]) == pytest.approx(-0.65, abs=0.1)
    x = states(sde)
    v, s, cross = x[:, 1], x[:, 0], sde.rho * sde.xi * x[:, 0] * x[:, 1]
    gram = torch.stack((v * s * s, cross, cross, sde.xi**2 * v), 1).reshape(-1, 2, 2)
    g = sde.diffusion(x, TIME)
    torch.testing.assert_close(g @ g.mT, gram)


def test_a_cir_path_that_oversteps_zero_comes_back():
    sde = CIR(1.0, 0.5, 0.9)
    x = integrate(sde, many(0.01, 20_000), torch.linspace(0, 1, 21), EulerMaruyama(), seed=0).x
    assert x.isfinite().all() and float(x.min()) > -0.3
    below = torch.tensor([-0.1], dtype=f64)
    assert sde.diffusion(below, TIME) == 0 and sde.drift(below, TIME) > 0


def test_lorenz_moves_as_lorenz_wrote():
    x = torch.tensor([[1.0, 2.0, 3.0]], dtype=f64)
    expected = torch.tensor([[10.0, 28 - 3 - 2, 2 - 8]], dtype=f64)
    torch.testing.assert_close(Lorenz().drift(x, TIME), expected)
    images = x[:, :, None, None].expand(1, 3, 2, 4)
    assert Lorenz().drift(images, TIME).shape == images.shape
