"""How multistep methods begin and end: `start`, `last` and `reach`, the same options for all."""

import functools

import pytest
import torch
from predictions import assert_same, line, run, weights
from sdeflow_plugins.solvers.dpmpp import DPMpp2M, DPMpp3M
from sdeflow_plugins.solvers.er_sde import ERSDE
from sdeflow_plugins.solvers.multistep import PREDICTIONS, VARIABLES, Multistep
from sdeflow_plugins.solvers.pndm import PNDM

from sdeflow import (
    VP,
    ArgumentError,
    PairingError,
    RectifiedFlow,
    integrate,
    probability_flow,
    reverse,
)
from sdeflow.grid import log_snr, uniform
from sdeflow.testing import GaussianData, MixtureData, order, strong_errors

DOUBLE = torch.float64
METHODS = {
    "dpmpp_2m": (DPMpp2M, 2),
    "dpmpp_3m": (DPMpp3M, 3),
    "er_sde_3": (ERSDE, 3),
    "ipndm_4": (PNDM, 4),
    "engine": (functools.partial(Multistep, "data", "log_snr", 3), 3),
}
each = pytest.mark.parametrize("method", METHODS)


# ---- every multistep method


@each
def test_every_method_drops_to_the_first_order_at_the_end_if_told(method):
    make, points = METHODS[method]
    ts = line(0.8, 0.6, 0.45, 0.33, 0.24)
    prediction = "noise" if method == "ipndm_4" else "data"
    used = {
        last: sum(abs(w) > 1e-12 for w in weights(make(last=last), VP(), ts, 0.0, prediction))
        for last in ("full", "lower")
    }
    assert used == {"full": points, "lower": 1}


@each
def test_every_method_drops_to_the_first_order_where_a_step_is_far_longer_than_the_last(method):
    make, points = METHODS[method]
    prediction = "noise" if method == "ipndm_4" else "data"
    long, short = line(0.8, 0.75, 0.7, 0.65, 0.1), line(0.8, 0.75, 0.7, 0.65, 0.61)

    def used(ts, **options):
        made = weights(make(last="auto", **options), VP(), ts, 0.0, prediction)
        return sum(abs(w) > 1e-12 for w in made)

    assert used(long) == 1 and used(short) == points
    assert used(long, reach=1e3) == points


@each
def test_every_method_begins_with_single_steps_of_two_more_evaluations_if_told(method):
    make, points = METHODS[method]
    process = probability_flow(VP(), MixtureData.five(VP()))
    x, ts = torch.ones(2, 2, dtype=DOUBLE), START(VP(), 10)
    assert integrate(process, x, ts, make(start="single")).nfe == 10 + 2 * (points - 1)
    assert integrate(process, x, ts, make(start="grow")).nfe == 10


@pytest.mark.parametrize(
    ("method", "grown", "single"), [("dpmpp_3m", 2, 3), ("er_sde_3", 2, 3), ("dpmpp_2m", 2, 2)]
)
def test_single_steps_at_the_start_keep_the_order(method, grown, single):
    make, steps = METHODS[method][0], [80, 160]
    for start, expected in (("grow", grown), ("single", single)):
        measured = order(strong_errors(make(start=start), VP(), steps, START), steps)
        assert measured == pytest.approx(expected, abs=0.12)


@each
@pytest.mark.parametrize("last", ["full", "lower", "auto"])
@pytest.mark.parametrize("start", ["grow", "single"])
def test_every_method_runs_from_alpha_zero_to_sigma_zero(method, start, last):
    sde = RectifiedFlow()
    data = GaussianData(sde, line(0.7), line(1e-4))
    x = torch.linspace(-2, 2, 5, dtype=DOUBLE).unsqueeze(1)
    for n in (1, 2, 3, 12):
        solver = METHODS[method][0](start=start, last=last)
        made = integrate(probability_flow(sde, data), x, uniform(sde, n, t_min=0.0), solver).x
        assert made.isfinite().all()
        assert n < 12 or (made - 0.7).abs().max() < 0.1


@each
def test_a_start_by_single_steps_is_for_flows_and_a_wrong_setting_is_refused(method):
    make = METHODS[method][0]
    data = GaussianData(VP(), line(0.7), line(0.1))
    x, ts = torch.ones(2, 1, dtype=DOUBLE), START(VP(), 4)
    with pytest.raises(PairingError, match="not deterministic"):
        integrate(reverse(VP(), data), x, ts, make(start="single"), seed=0)
    for options in ({"start": "euler"}, {"last": "first"}, {"reach": 0.0}):
        with pytest.raises(ArgumentError, match=next(iter(options))):
            make(**options)


@each
def test_the_order_that_is_declared_follows_the_last_steps(method):
    make, points = METHODS[method]
    best = 2 if method == "ipndm_4" else points
    assert make(last="full").order == best and make(last="lower").order == min(2, best)


# ---- the engine


START = functools.partial(log_snr, t_max=0.3, t_min=0.02)
"""From where the marginal is far from the noise, so that the first step shows."""


@pytest.mark.parametrize(
    ("settings", "grown", "single"),
    [
        (("data", "log_snr", 3, 0), 2, 3),
        (("data", "log_snr", 4, 0), 2, 4),
        (("noise", "time", 3, 0), 2, 3),
        (("v", "angle", 3, 0), 2, 3),
        (("data", "log_snr", 3, 4), 3, 4),
    ],
)
def test_single_steps_at_the_start_keep_the_order_that_growing_loses(settings, grown, single):
    steps = [80, 160]
    for start, expected in (("grow", grown), ("single", single)):
        solver = Multistep(*settings, start=start, last="full")
        measured = order(strong_errors(solver, VP(), steps, START), steps)
        assert measured == pytest.approx(expected, abs=0.12)
    assert solver.order == single


def test_single_steps_cost_two_evaluations_each_at_the_start():
    process = probability_flow(VP(), MixtureData.five(VP()))
    x, ts = torch.ones(2, 2, dtype=DOUBLE), START(VP(), 10)
    for points in (1, 2, 3, 4):
        made = integrate(process, x, ts, Multistep(points=points, start="single"))
        assert made.nfe == 10 + 2 * (points - 1)


def test_lower_drops_to_two_and_one_at_the_end_and_corrects_accordingly():
    ts = line(0.8, 0.6, 0.45, 0.33, 0.24)
    lower = Multistep("data", points=3, last="lower")
    full = Multistep("data", points=3, last="full")
    assert sum(w != 0 for w in weights(full, VP(), ts)) == 3
    assert sum(w != 0 for w in weights(lower, VP(), ts)) == 1
    assert lower.order == 2 and full.order == 3
    states = {}
    for points, last in ((3, "lower"), (2, "full")):
        states[last] = run(Multistep("data", points=points, corrector=points + 1, last=last), n=2)
    assert_same(states["lower"], run(Multistep("data", points=1, corrector=2), n=2))
    assert (states["lower"] - states["full"]).abs().max() > 1e-3


def test_auto_drops_to_one_where_a_step_is_far_longer_than_the_last():
    long, short = line(0.5, 0.45, 0.05), line(0.5, 0.45, 0.41)
    for ts, left in ((long, 1), (short, 2)):
        assert sum(w != 0 for w in weights(Multistep("data"), VP(), ts)) == left
    assert sum(w != 0 for w in weights(Multistep("data", reach=1e3), VP(), long)) == 2
    assert sum(w != 0 for w in weights(Multistep("data", last="full"), VP(), long)) == 2


@pytest.mark.parametrize("last", ["full", "lower", "auto"])
@pytest.mark.parametrize("start", ["grow", "single"])
@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_setting_runs_from_alpha_zero_to_sigma_zero(prediction, variable, start, last):
    """On a rectified flow, one-point data come out as they are, or nearly."""
    sde = RectifiedFlow()
    data = GaussianData(sde, line(0.7), line(1e-4))
    for n in (1, 2, 3, 12):
        for corrector in (0, 3):
            solver = Multistep(prediction, variable, 3, corrector, start=start, last=last)
            x = torch.linspace(-2, 2, 5, dtype=DOUBLE).unsqueeze(1)
            made = integrate(probability_flow(sde, data), x, uniform(sde, n, t_min=0.0), solver).x
            assert made.isfinite().all()
            if n == 12 and solver.point_exact:
                assert (made - 0.7).abs().max() < 0.1
