"""Grids: n + 1 decreasing times, ends exactly as asked; the published ones, number by number."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdeflow import (
    EDM,
    GBM,
    VE,
    VP,
    ArgumentError,
    GridError,
    RectifiedFlow,
    ShapeError,
)
from sdeflow import grid as grids
from sdeflow.grid import GRIDS, check_grid

CONTINUOUS = ["uniform", "quadratic", "karras", "log_snr"]
DISCRETE = ["leading", "linspace", "trailing"]
counts = st.integers(1, 200)
continuous, discrete = (pytest.mark.parametrize("name", names) for names in (CONTINUOUS, DISCRETE))


# ---- every grid


@pytest.mark.parametrize("name", GRIDS)
@given(n=counts)
def test_a_grid_has_n_steps_down_in_float64(sde, name, n):
    for to_zero in (False, True):
        ts = GRIDS[name](sde, n, to_zero=to_zero)
        assert ts.shape == (n + 1,) and ts.dtype == torch.float64
        assert (ts.diff() < 0).all() and ts[0] <= sde.T
        assert (ts[-1] == 0) == to_zero


@continuous
@given(n=counts, ends=st.tuples(st.floats(1e-4, 0.4), st.floats(0.6, 0.999)))
def test_the_ends_are_exactly_those_asked_for(sde, name, n, ends):
    low, high = ends[0] * sde.T, ends[1] * sde.T
    ts = GRIDS[name](sde, n, t_min=low, t_max=high)
    assert (float(ts[0]), float(ts[-1])) == (high, low)
    default = GRIDS[name](sde, n)
    assert (float(default[0]), float(default[-1])) == (sde.T, sde.t_min)


@continuous
@given(n=st.integers(2, 50))
def test_to_zero_puts_its_last_step_from_t_min_to_zero(sde, name, n):
    ts = GRIDS[name](sde, n, to_zero=True)
    assert torch.equal(ts[:-1], GRIDS[name](sde, n - 1))
    assert GRIDS[name](sde, 1, to_zero=True).tolist() == [sde.T, 0.0]


@continuous
def test_the_middle_of_a_grid_halves_its_variable(name):
    """t, sqrt(t), (sigma/alpha)^(1/7) and log-SNR run evenly."""
    sde, n = VP(), 16
    ts = GRIDS[name](sde, n, t_max=0.9, t_min=0.01)
    ratio = sde.sigma(ts) / sde.alpha(ts)
    variables = {
        "uniform": ts,
        "quadratic": ts.sqrt(),
        "karras": ratio ** (1 / 7),
        "log_snr": ratio.log(),
    }
    steps = variables[name].diff()
    torch.testing.assert_close(steps, steps.mean().expand(n), rtol=1e-9, atol=0)


# ---- the published ones


def test_karras_is_equation_5_of_edm():
    """sigma_max = 80, sigma_min = 0.002, rho = 7, N = 18, then 0: the sampler of CIFAR-10."""

    def published(i):
        return (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7

    ts = grids.karras(EDM(), 18, to_zero=True)
    assert ts.tolist() == pytest.approx([*map(published, range(18)), 0.0], rel=1e-10)
    assert ts[:3].tolist() == pytest.approx([80.0, 57.586, 40.786], rel=1e-4)


@given(st.floats(1, 15), st.integers(2, 40))
def test_karras_takes_any_rho_and_any_sde(rho, n):
    ts = grids.karras(VE(), n, rho=rho, t_min=0.1)
    ends = VE().sigma(torch.tensor([1.0, 0.1], dtype=torch.float64)) ** (1 / rho)
    even = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    expected = (ends[0] + even * (ends[1] - ends[0])) ** rho
    torch.testing.assert_close(VE().sigma(ts), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "name, n, steps",
    [
        # Lin et al. (2024), table 2: T = 1000, 10 steps, counted from 1
        ("leading", 10, [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]),
        ("linspace", 10, [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1]),
        ("trailing", 10, [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100]),
        ("leading", 6, [831, 665, 499, 333, 167, 1]),
        ("trailing", 6, [1000, 833, 667, 500, 333, 167]),
        ("leading", 1, [1]),
        ("linspace", 1, [1000]),
        ("trailing", 1, [1000]),
    ],
)
def test_discrete_spacings_visit_the_steps_of_their_table(name, n, steps):
    ts = GRIDS[name](VP(), n)
    assert ts.tolist() == pytest.approx([k / 1000 for k in steps] + [0.0], abs=1e-15)


@discrete
@given(n=st.integers(1, 64), more=st.integers(0, 1000))
def test_discrete_spacings_visit_whole_training_steps_of_any_model(sde, name, n, more):
    m = n + more
    ts = GRIDS[name](sde, n, train_steps=m)
    steps = ts[:-1] * m / sde.T
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-9)
    assert steps[-1] > 0.5 and steps[0] < m + 0.5


@discrete
@pytest.mark.parametrize("n", [2, 7, 10, 50, 333, 1000])
def test_discrete_spacings_are_those_of_diffusers(name, n):
    """Its index i is our step i + 1 with steps_offset = 0. (Of linspace with n = 1 it takes the
    clean end, we the noisy one.)"""
    scheduler = pytest.importorskip("diffusers").DDIMScheduler(
        num_train_timesteps=1000, timestep_spacing=name, steps_offset=0
    )
    scheduler.set_timesteps(n)
    ours = GRIDS[name](VP(), n)[:-1] * 1000 - 1
    assert ours.round().long().tolist() == scheduler.timesteps.tolist()


# ---- errors


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("n", [0, -1, 2.5, True, "ten", None], ids=repr)
def test_the_number_of_steps_is_whole_and_positive(name, n):
    with pytest.raises(ArgumentError, match="steps=.*such as 20"):
        GRIDS[name](VP(), n)


@continuous
@pytest.mark.parametrize(
    "ends", [(0.5, 0.5), (0.6, 0.5), (-0.1, 1.0), (0.1, 1.1), (math.nan, 1.0), (0.1, math.nan)]
)
def test_the_ends_must_be_in_order_and_in_range(name, ends):
    with pytest.raises(GridError, match=r"t_min=.* and t_max=.* must obey 0 <= t_min < t_max <= T"):
        GRIDS[name](VP(), 5, t_min=ends[0], t_max=ends[1])


@pytest.mark.parametrize("name", ["karras", "log_snr"])
def test_log_snr_grids_need_a_single_finite_log_snr(name):
    with pytest.raises(GridError, match="needs log-SNR, which GBM has not; use the grid 'uniform'"):
        GRIDS[name](GBM(), 5)
    with pytest.raises(GridError, match="log-SNR is inf at t_min=0.0 .*to_zero=True"):
        GRIDS[name](VP(), 5, t_min=0.0)

    class Channels(VP):
        def sigma(self, t):
            return super().sigma(t)[..., None] * torch.tensor([0.5, 1.0])

    with pytest.raises(ShapeError, match="Channels has elementwise schedules.*grid 'uniform'"):
        GRIDS[name](Channels(), 5)


@pytest.mark.parametrize("name", ["karras", "log_snr"])
def test_a_grid_may_begin_where_alpha_vanishes(name):
    """It is the grid from 0.999 T, begun at T."""
    ts, near = GRIDS[name](RectifiedFlow(), 5), GRIDS[name](RectifiedFlow(), 5, t_max=0.999)
    assert ts[0] == 1.0 and near[0] == 0.999
    torch.testing.assert_close(ts[1:], near[1:])


@pytest.mark.parametrize("rho", [0, -1, math.nan])
def test_rho_is_positive(rho):
    with pytest.raises(ArgumentError, match="rho=.* must be > 0; EDM uses 7"):
        grids.karras(EDM(), 5, rho=rho)


@discrete
def test_there_are_no_more_steps_than_were_trained(name):
    with pytest.raises(GridError, match="steps=11 must be at most train_steps=10"):
        GRIDS[name](VP(), 11, train_steps=10)
    with pytest.raises(ArgumentError, match="train_steps=2.5"):
        GRIDS[name](VP(), 11, train_steps=2.5)


# ---- a user's own times


@given(st.lists(st.floats(0, 100), min_size=2, max_size=20, unique=True))
def test_monotone_times_of_any_container_and_direction_pass(times):
    for ordered in (sorted(times), sorted(times, reverse=True)):
        for container in (list, tuple, partial(torch.tensor, dtype=torch.float64)):
            made = check_grid(container(ordered))
            assert made.tolist() == ordered and made.dtype == torch.float64


@pytest.mark.parametrize(
    "ts, message",
    [
        ([1.0, math.nan, 0.0], r"ts\[1\]=nan must be a finite time >= 0"),
        ([math.inf, 0.0], r"ts\[0\]=inf must be a finite time >= 0"),
        ([1.0, 0.5, -0.1], r"ts\[2\]=-0.1 must be a finite time >= 0; data sit at t = 0"),
        ([1.0, 0.5, 0.5, 0.0], r"monotone; ts\[1\]=0.5 is followed by ts\[2\]=0.5"),
        ([1.0, 0.2, 0.5, 0.0], r"monotone; ts\[1\]=0.2 is followed by ts\[2\]=0.5"),
        ([0.0, 0.5, 0.2, 1.0], r"monotone; ts\[1\]=0.5 is followed by ts\[2\]=0.2"),
        ([0.5, 0.5], "must be strictly monotone"),
        ([[1.0, 0.0]], r"ts has shape \(1, 2\); it must be \(N\+1,\), at least two times"),
        ([1.0], r"ts has shape \(1,\)"),
        ([], r"ts has shape \(0,\)"),
        (20, r"ts has shape \(\)"),
        ("karras", r"ts='karras' must be times, such as grid.karras\(sde, 20\)"),
        (None, "ts=None must be times"),
        ([[1.0], [0.5, 0.0]], "must be times"),
    ],
    ids=str,
)
def test_other_times_are_refused_with_their_place(ts, message):
    with pytest.raises(GridError, match=message):
        check_grid(ts)


def test_times_from_python_keep_all_their_digits():
    ts = [1.0, 1.0 - 1e-12, 0.1]
    assert check_grid(ts).tolist() == ts


def test_a_grid_does_not_keep_gradients_and_does_not_change_its_input():
    ts = torch.tensor([1.0, 0.5, 0.0], requires_grad=True)
    assert not check_grid(ts).requires_grad and ts.requires_grad


def test_a_new_grid_costs_one_line():
    cubic = grids.grid(lambda sde, t_max, t_min, u: t_max * (t_min / t_max) ** (u**3))
    assert cubic(VP(), 2, t_min=0.5).tolist() == pytest.approx([1.0, 0.5**0.125, 0.5])
