"""The grids of the literature beyond the core's: formulas, tables, and what they are best at."""

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import sdes
from scipy import stats
from sdeflow_plugins.gits import fitted
from sdeflow_plugins.grids import ALIGNED
from sdeflow_plugins.solvers.ddim import DDIM

from sdeflow import (
    EDM,
    GBM,
    VE,
    VP,
    RectifiedFlow,
    catalogue,
    get,
    integrate,
    probability_flow,
    reverse,
)
from sdeflow.errors import ArgumentError, GridError
from sdeflow.grid import karras, log_snr, uniform
from sdeflow.testing import GaussianData, MixtureData, output_law

DOUBLE = torch.float64
SHAPED = ("polyexponential", "arctan", "angle", "beta", "shift", "dynamic_shift")
LEVELS = ("polyexponential", "arctan", "angle", "align_your_steps")


def line(*numbers):
    return torch.tensor(numbers, dtype=DOUBLE)


def rho(sde, ts):
    return sde.sigma(ts) / sde.alpha(ts)


@given(sdes, st.sampled_from(SHAPED), st.integers(1, 40), st.booleans())
def test_grids_are_monotone_from_end_to_end(sde, name, n, to_zero):
    ts = get("grid", name)(sde, n, to_zero=to_zero)
    assert ts.dtype == DOUBLE and ts.shape == (n + 1,) and (ts.diff() < 0).all()
    assert ts[0] == sde.T
    assert ts[-1] == (0 if to_zero else sde.t_min)
    if to_zero and n > 1:
        assert ts[-2] == sde.t_min


@given(st.sampled_from(SHAPED), st.floats(0.001, 0.3), st.floats(0.5, 1), st.integers(1, 9))
def test_grids_go_between_the_ends_given(name, low, high, n):
    ts = get("grid", name)(RectifiedFlow(), n, t_min=low, t_max=high)
    assert ts[0] == high and ts[-1] == low and len(ts) == n + 1


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_polyexponential_is_k_diffusions(power):
    """exp(ramp^rho (log s_max - log s_min) + log s_min), ramp from 1 to 0."""
    made = rho(VP(), get("grid", "polyexponential", rho=power)(VP(), 9))
    high, low = made[0].log(), made[-1].log()
    ramp = torch.linspace(1, 0, 10, dtype=DOUBLE)
    torch.testing.assert_close(made, (ramp**power * (high - low) + low).exp())
    if power == 1:
        torch.testing.assert_close(get("grid", "exponential")(VP(), 9), log_snr(VP(), 9))


@pytest.mark.parametrize("std", [0.3, 1.0])
def test_arctan_is_uniform_in_the_angle(std):
    for sde in (VP(), VE(), EDM()):
        angle = torch.atan(rho(sde, get("grid", "arctan", std=std)(sde, 12)) / std)
        torch.testing.assert_close(angle.diff(), angle.diff().mean().expand(12))


@pytest.mark.parametrize("power", [0.3, 1.0])
def test_angle_is_uniform_in_the_angle_of_a_power(power):
    """At power 1 it is arctan; towards 0 it is log_snr."""
    for sde in (VP(), VE(), EDM()):
        ts = get("grid", "angle", std=0.7, power=power)(sde, 12)
        angle = torch.atan((rho(sde, ts) / 0.7) ** power)
        torch.testing.assert_close(angle.diff(), angle.diff().mean().expand(12))
    nearly = get("grid", "angle", power=1e-4)(VP(), 12)
    torch.testing.assert_close(nearly, log_snr(VP(), 12), rtol=1e-3, atol=0)


@given(st.lists(st.floats(0.1, 1), min_size=6, max_size=6), st.floats(0.2, 2))
@settings(max_examples=30)
def test_ddim_on_gaussian_data_is_the_product_of_cosines_which_arctan_makes_largest(gaps, std):
    sde = EDM()
    data, best = GaussianData(sde, line(0.0), line(std**2)), get("grid", "arctan", std=std)(sde, 6)
    steps = line(*gaps).cumsum(0)
    other = sde.time_of_log_snr(
        torch.lerp(*sde.log_snr(best[[0, -1]]), torch.cat((line(0.0), steps / steps[-1])))
    )
    shares = []
    for ts in (best, other):
        angle = torch.atan(rho(sde, ts) / std)
        start, end = data.law(ts[0])[1], data.law(ts[-1])[1]
        made = output_law(probability_flow(sde, data), ts, DDIM(), line(0.0), start)[1]
        shares.append(float((made / end).sqrt()))
        assert shares[-1] == pytest.approx(float(angle.diff().cos().prod()), rel=1e-10)
    assert shares[1] <= shares[0] * (1 + 1e-12)
    assert 1 - shares[0] == pytest.approx(math.pi**2 / 48, rel=0.12)


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (2.0, 1.0)])
def test_beta_is_the_quantiles_of_its_law(a, b):
    ts = get("grid", "beta", a=a, b=b)(VP(), 10)
    quantiles = stats.beta.ppf(torch.linspace(1, 0, 11).numpy(), a, b)
    expected = 1e-3 + (1 - 1e-3) * torch.from_numpy(quantiles)
    torch.testing.assert_close(ts, expected.to(DOUBLE), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_shift_is_sd3s(factor):
    sde = RectifiedFlow()
    ts = get("grid", "shift", factor=factor)(sde, 8, t_min=0.0)
    u = torch.linspace(1, 0, 9, dtype=DOUBLE)
    torch.testing.assert_close(ts, factor * u / (1 + (factor - 1) * u))
    if factor == 1:
        torch.testing.assert_close(get("grid", "shift", factor=1.0)(sde, 8), uniform(sde, 8))


def test_dynamic_shift_is_fluxs():
    """e^mu/(e^mu + 1/u - 1), mu linear in the tokens from 0.5 at 256 to 1.15 at 4,096."""
    u = torch.linspace(1, 0, 9, dtype=DOUBLE)
    for tokens, mu in ((256, 0.5), (4096, 1.15), (1024, 0.5 + 0.65 * 768 / 3840)):
        ts = get("grid", "dynamic_shift", tokens=tokens)(RectifiedFlow(), 8, t_min=0.0)
        torch.testing.assert_close(ts, math.exp(mu) / (math.exp(mu) + 1 / u - 1))


# ---- published tables


@pytest.mark.parametrize("model", ALIGNED)
def test_align_your_steps_gives_its_tables_at_ten_steps(model):
    ts = get("grid", "ays", model=model)(EDM(T=1000.0), 10)
    torch.testing.assert_close(rho(EDM(), ts), line(*ALIGNED[model]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("n", [1, 2, 7, 25])
def test_align_your_steps_is_log_linear_between(n):
    for to_zero in (False, True):
        ts = get("grid", "align_your_steps")(VP(), n, to_zero=to_zero)
        assert ts.shape == (n + 1,) and (ts.diff() < 0).all() and (ts[-1] == 0) == to_zero
    levels = rho(VP(), get("grid", "align_your_steps")(VP(), 20)).log()
    torch.testing.assert_close(levels[1::2], (levels[:-1:2] + levels[2::2]) / 2)


def test_align_your_steps_stretches_to_the_ends_of_any_sde():
    for sde in (VP(), VE(), RectifiedFlow(), EDM()):
        ts = get("grid", "align_your_steps", model="svd", stretch=True)(sde, 10)
        high, low = rho(sde, log_snr(sde, 1, t_max=0.999 if sde == RectifiedFlow() else None))
        torch.testing.assert_close(rho(sde, ts)[[0, -1]], torch.stack((high, low)))


def test_levels_beyond_those_of_the_sde_are_refused():
    for sde, model in ((EDM(), "svd"), (VP(), "svd"), (EDM(t_min=0.1), "sd15")):
        with pytest.raises(GridError, match="use stretch=True for the shape"):
            get("grid", "align_your_steps", model=model)(sde, 10)


# ---- GITS


def mixture(sde):
    return probability_flow(sde, MixtureData.five(sde))


def states(sde, t, n=48):
    z = torch.randn(n, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(n))
    return sde.prior(z, t)


def test_a_fitted_grid_is_better_than_karras_at_six_steps():
    """On states that it was not fitted to, against a fine run."""
    sde = EDM()
    process, fine = mixture(sde), karras(sde, 60)
    grid = fitted(process, states(sde, fine[0]), fine)
    x = states(sde, fine[0], 64)
    exact = integrate(process, x, log_snr(sde, 400), "dpmpp_3m").x
    errors = [
        float((integrate(process, x, g(sde, 6), DDIM()).x - exact).square().mean().sqrt())
        for g in (grid, karras)
    ]
    assert errors[0] < 0.7 * errors[1]


def test_the_fitted_grid_is_the_best_of_all_subsets_of_the_fine_one():
    """By brute force over the sums of single-step errors."""
    sde = VP()
    process, fine = mixture(sde), log_snr(sde, 8)
    x = states(sde, fine[0])
    path = integrate(process, x, fine, DDIM(), keep=True).path

    def cost(i, j):
        made = integrate(process, path[i], fine[[i, j]], DDIM()).x
        return float((made - path[j]).norm(dim=1).mean())

    best = min(
        ([0, *inner, 8] for inner in itertools.combinations(range(1, 8), 3)),
        key=lambda nodes: sum(itertools.starmap(cost, itertools.pairwise(nodes))),
    )
    assert torch.equal(fitted(process, x, fine)(sde, 4), fine[best])
    assert torch.equal(fitted(process, x, fine)(sde, 8), fine)
    assert torch.equal(fitted(process, x, fine)(sde, 1), fine[[0, 8]])


def test_gits_by_name_takes_a_process_and_states():
    sde = EDM()
    process, x = mixture(sde), states(sde, line(80.0)[0], 8)
    ts = get("grid", "gits", process=process, x=x, fine=20)(sde, 5)
    assert torch.equal(ts, fitted(process, x, karras(sde, 20))(sde, 5))
    assert get("grid", "gits", process=process, x=x, fine=12, to_zero=True)(sde, 5)[-1] == 0


def test_a_fitted_grid_tells_what_it_cannot_do():
    sde = VP()
    process, fine = mixture(sde), log_snr(sde, 6)
    grid = fitted(process, states(sde, fine[0]), fine)
    with pytest.raises(GridError, match="fitted to VP"):
        grid(EDM(), 3)
    with pytest.raises(GridError, match="steps=7 must be at most 6"):
        grid(sde, 7)
    with pytest.raises(ArgumentError, match="steps=0"):
        grid(sde, 0)
    with pytest.raises(GridError, match="'gits' is fitted to a model: give process="):
        get("grid", "gits")(sde, 5)
    with pytest.raises(ArgumentError, match=r"must be a probability_flow\(sde, score\)"):
        fitted(reverse(sde, MixtureData.five(sde)), states(sde, fine[0]), fine)


# ---- errors


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("polyexponential", {"rho": 0.0}, "rho=0.0 must be > 0"),
        ("arctan", {"std": -1.0}, "std=-1.0 must be > 0"),
        ("angle", {"power": 0.0}, "std=0.5 and power=0.0 must be > 0"),
        ("beta", {"a": 0.0}, "a=0.0 and b=0.6 must be > 0"),
        ("shift", {"factor": 0.0}, "factor=0.0 must be > 0"),
        ("dynamic_shift", {"tokens": 0}, "tokens=0 must be at least 1"),
        ("align_your_steps", {"model": "sd3"}, "model='sd3' is unknown"),
        ("shift", {"mu": 1.0}, "grid 'shift' has no option 'mu'"),
    ],
)
def test_a_wrong_option_is_refused_by_name(name, options, message):
    with pytest.raises(ArgumentError, match=message):
        get("grid", name, **options)(RectifiedFlow(), 5)


@pytest.mark.parametrize("name", LEVELS)
def test_grids_of_levels_need_levels(name):
    with pytest.raises(GridError, match="needs log-SNR, which GBM has not"):
        get("grid", name)(GBM(), 5)
    assert get("grid", "beta")(GBM(), 5)[0] == GBM().T


@pytest.mark.parametrize("name", [*LEVELS[:2], "karras", "log_snr"])
def test_grids_of_levels_begin_at_alpha_zero_and_go_on_inside(name):
    build = get("grid", name)
    ts, inside = build(RectifiedFlow(), 6), build(RectifiedFlow(), 6, t_max=0.999)
    assert ts[0] == 1
    torch.testing.assert_close(ts[1:], inside[1:])


def test_every_grid_of_the_catalogue_says_what_it_is():
    for name, entry in catalogue("grid").items():
        assert len(entry.summary) > 20, name
    assert get("grid", "ays") is get("grid", "align_your_steps")
    assert isinstance(get("grid", "arctan", std=1.0), functools.partial)
