"""The bundled SDEs: their papers' defaults, closed values, and relations between them."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ztest import LIMIT, z_of_mean, z_of_variance

import sdeflow
from sdeflow import (
    EDM,
    GBM,
    OU,
    VE,
    VP,
    ArgumentError,
    Cosine,
    EulerMaruyama,
    RectifiedFlow,
    SubVP,
    integrate,
)

DEFAULTS = {
    VP: {"beta_min": 0.1, "beta_max": 20.0, "T": 1.0},  # Song et al. (2021), appendix C
    SubVP: {"beta_min": 0.1, "beta_max": 20.0, "T": 1.0},
    VE: {"sigma_min": 0.01, "sigma_max": 50.0, "T": 1.0},  # CIFAR-10
    Cosine: {"s": 0.008, "T": 0.9946},  # Nichol & Dhariwal (2021); Lu et al. (2022)
    EDM: {"t_min": 0.002, "T": 80.0},  # Karras et al. (2022), table 1
    RectifiedFlow: {"T": 1.0},
    OU: {"theta": 1.0, "volatility": math.sqrt(2)},  # stationary variance 1
    GBM: {"mu": 0.0, "volatility": 0.5},
}

unit = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)


def close(made, expected):
    torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", DEFAULTS, ids=lambda kind: kind.__name__)
def test_defaults_are_those_of_the_papers(kind):
    sde = kind()
    assert {name: getattr(sde, name) for name in DEFAULTS[kind]} == DEFAULTS[kind]


@pytest.mark.parametrize("kind", DEFAULTS, ids=lambda kind: kind.__name__)
def test_an_sde_is_a_value_and_its_repr_the_config(kind):
    sde = kind()
    assert sde == kind() and hash(sde) == hash(kind())
    assert eval(repr(sde), vars(sdeflow)) == sde
    with pytest.raises(dataclasses.FrozenInstanceError):
        sde.T = 2.0


def test_vp_has_the_closed_values_of_its_integral():
    """B(t) = 0.1 t + 9.95 t^2."""
    sde, integral = VP(), 0.1 * unit + 9.95 * unit**2
    close(sde.alpha(unit), torch.exp(-integral / 2))
    close(sde.sigma(unit) ** 2, 1 - torch.exp(-integral))
    close(sde.rates(unit)[0], -(0.1 + 19.9 * unit) / 2)
    close(sde.rates(unit)[1], 0.1 + 19.9 * unit)
    assert float(sde.alpha(torch.tensor(1.0))) == pytest.approx(math.exp(-5.025))


@given(st.floats(0.01, 5), st.floats(0, 30))
def test_vp_of_any_rates_preserves_variance_and_inverts(beta_min, more):
    sde = VP(beta_min, beta_min + more)
    close(sde.alpha(unit) ** 2 + sde.sigma(unit) ** 2, torch.ones_like(unit))
    torch.testing.assert_close(sde.time_of_log_snr(sde.log_snr(unit)), unit, rtol=1e-8, atol=0)


def test_vp_is_the_limit_of_the_schedule_of_ddpm():
    """prod (1 - beta_i), beta from 1e-4 to 0.02 in 1000 steps, is alpha^2 at i/1000, to O(beta)."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    gap = (VP().alpha(t) ** 2 - (1 - betas).cumprod(0)).abs().max()
    assert gap < 2.5e-3
    wrong = (VP(0.1, 18.0).alpha(t) ** 2 - (1 - betas).cumprod(0)).abs().max()
    assert wrong > 10 * gap


def test_subvp_has_the_squared_variance_of_vp():
    close(SubVP().alpha(unit), VP().alpha(unit))
    close(SubVP().sigma(unit), VP().sigma(unit) ** 2)
    # Song et al. (2021), eq. 12: g^2 = beta (1 - exp(-2 B))
    f, beta = VP().rates(unit)
    close(SubVP().rates(unit)[0], f)
    close(SubVP().rates(unit)[1], beta * (1 - VP().alpha(unit) ** 4))


def test_ve_is_the_geometric_schedule_started_at_zero():
    """Song et al. (2021), eq. 29: sigma(t) = sigma_min (sigma_max/sigma_min)^t for t > 0."""
    geometric = 0.01 * 5000**unit
    close(VE().sigma(unit) ** 2 + 0.01**2, geometric**2)
    g = 0.01 * 5000**unit * math.sqrt(2 * math.log(5000))  # eq. 30
    close(VE().rates(unit)[1], g**2)


def test_cosine_is_the_schedule_of_its_paper():
    """Nichol & Dhariwal (2021), eq. 17."""

    def f(t):
        return torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    t = unit * Cosine().T
    close(Cosine().alpha(t) ** 2, f(t) / f(torch.tensor(0.0).double()))
    close(Cosine().alpha(t) ** 2 + Cosine().sigma(t) ** 2, torch.ones_like(t))
    assert math.log(Cosine().alpha(torch.tensor(Cosine().T))) == pytest.approx(-4.77, abs=0.01)


def test_edm_time_is_the_noise_level_and_flow_paths_are_straight():
    close(EDM().sigma(unit), unit)
    close(EDM().alpha(unit), torch.ones_like(unit))
    close(EDM().rates(unit)[1], 2 * unit)
    close(RectifiedFlow().alpha(unit) + RectifiedFlow().sigma(unit), torch.ones_like(unit))
    close(RectifiedFlow().slopes(unit)[0], -torch.ones_like(unit))
    close(RectifiedFlow().slopes(unit)[1], torch.ones_like(unit))


@given(st.floats(0.1, 5), st.floats(0.1, 3))
def test_ou_of_any_parameters_tends_to_its_stationary_law(theta, volatility):
    sde, late = OU(theta, volatility, T=100.0), torch.tensor(100.0).double()
    assert float(sde.sigma(late) ** 2) == pytest.approx(volatility**2 / (2 * theta))
    assert float(sde.alpha(late)) == pytest.approx(math.exp(-100 * theta))


def test_ou_with_unit_rate_is_vp_with_beta_two():
    close(OU().alpha(unit), VP(2.0, 2.0).alpha(unit))
    close(OU().sigma(unit), VP(2.0, 2.0).sigma(unit))


@pytest.mark.parametrize("mu, volatility", [(0.0, 0.5), (0.3, 0.2)])
def test_gbm_is_lognormal_with_the_drift_of_ito(mu, volatility):
    """log x_1 = (mu - volatility^2/2) + volatility w_1: two z-tests, each with a false-alarm rate
    below 1e-6; the drift of Stratonovich, mu, is rejected. 400 steps leave a bias of order h, less
    than a sixth of a standard error."""
    sde, x = GBM(mu, volatility), torch.ones(20_000, 1, dtype=torch.float64)
    grid = torch.linspace(0, 1, 401, dtype=torch.float64)
    log_x = integrate(sde, x, grid, EulerMaruyama(), seed=1).x.log()
    assert abs(z_of_mean(log_x, mu - volatility**2 / 2)) < LIMIT
    assert abs(z_of_variance(log_x, volatility**2)) < LIMIT
    assert abs(z_of_mean(log_x, mu)) > LIMIT


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (VP, {"beta_min": -1.0}),
        (VP, {"T": -1.0}),
        (VP, {"t_min": 1.0}),
        (VE, {"sigma_min": 0.0}),
        (VE, {"sigma_max": -1.0}),
        (OU, {"theta": 0.0}),
        (EDM, {"T": math.inf}),
        (RectifiedFlow, {"T": 2.0}),
    ],
)
def test_parameters_that_make_no_schedule_are_refused(kind, options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        kind(**options)
