"""The engine of multistep samplers: its integrals are exact, its members are what they are called.

What an evaluation weighs in the state is read off from runs whose k-th prediction is one in row k
and zero elsewhere.
"""

import functools
import math

import mpmath
import pytest
import torch
from predictions import OneHot, assert_same, line, run, weights
from sdeflow_plugins.solvers.ddim import DDIM
from sdeflow_plugins.solvers.dpm_solver import DPMSolver
from sdeflow_plugins.solvers.dpmpp import DPMpp2M, DPMpp3M
from sdeflow_plugins.solvers.er_sde import ERSDE
from sdeflow_plugins.solvers.multistep import PREDICTIONS, VARIABLES, Multistep

from sdeflow import (
    EDM,
    VE,
    VP,
    Cosine,
    RectifiedFlow,
    ReverseSDE,
    SubVP,
    get,
    integrate,
    probability_flow,
)
from sdeflow.errors import ArgumentError, GridError, PairingError
from sdeflow.grid import log_snr
from sdeflow.testing import GaussianData, MixtureData, order, output_law, strong_errors, weak_errors

DOUBLE = torch.float64
SDES = (VP(), SubVP(), VE(), Cosine(), EDM(), RectifiedFlow())
names = functools.partial(pytest.mark.parametrize, ids=lambda value: type(value).__name__)


def exact_vp(t):
    """alpha, sigma of VP to 30 digits."""
    b = t * (mpmath.mpf("0.1") + mpmath.mpf("19.9") * t / 2)
    return mpmath.exp(-b / 2), mpmath.sqrt(-mpmath.expm1(-b))


def exact_weights(prediction, variable, ts, eta):
    """The integrals of the Lagrange polynomials to 20 digits, in time."""
    ts = [mpmath.mpf(float(t)) for t in ts]
    (a_s, s_s), rate = exact_vp(ts[-1]), 1 + mpmath.mpf(eta) ** 2

    def place(t):
        a, s = exact_vp(t)
        known = {"time": t, "log_snr": mpmath.log(a / s), "rho": s / a, "angle": mpmath.atan2(s, a)}
        return known[variable]

    def measure(t):
        a, s = exact_vp(t)
        if prediction == "data":
            return a_s * mpmath.exp(-rate * (mpmath.log(a_s / s_s) - mpmath.log(a / s)))
        return a_s * s / a if prediction == "noise" else mpmath.atan2(s, a)

    at = [place(t) for t in ts[:-1]]

    def lagrange(j, u):
        return mpmath.fprod((u - p) / (at[j] - p) for k, p in enumerate(at) if k != j)

    def integral(j):
        return mpmath.quad(
            lambda t: lagrange(j, place(t)) * mpmath.diff(measure, t), [ts[-2], ts[-1]], maxdegree=5
        )

    return [float(integral(j)) for j in range(len(at))]


# ---- the integrals


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_weights_are_the_exact_integrals(prediction, variable):
    ts = line(0.8, 0.55, 0.4, 0.2)
    eta = 0.7 if prediction == "data" and variable == "rho" else 0.0
    solver = Multistep(prediction, variable, 3, last="full")
    with mpmath.workdps(20):
        expected = exact_weights(prediction, variable, ts, eta)
    assert weights(solver, VP(), ts, eta) == pytest.approx(expected, rel=1e-12, abs=1e-13)


def test_the_weights_of_er_sde_are_the_exact_integrals():
    """At scale "sde" it is the engine in rho; at its own, phi = rho (e^(rho^0.3) + 10)."""
    ts = line(0.8, 0.55, 0.4, 0.2)
    ours = weights(Multistep("data", "rho", 3, last="full"), VP(), ts, 0.6)
    ers = weights_of_er_sde("sde", ts, 0.6)
    assert ers == pytest.approx(ours, rel=1e-12)
    with mpmath.workdps(20):
        rho = [s / a for a, s in (exact_vp(mpmath.mpf(float(t))) for t in ts)]
        a_s, _ = exact_vp(mpmath.mpf(float(ts[-1])))

        def phi(r):
            return r * (mpmath.exp(r ** mpmath.mpf("0.3")) + 10)

        def integral(j):
            def part(r):
                others = (p for k, p in enumerate(rho[:-1]) if k != j)
                l_j = mpmath.fprod((r - p) / (rho[j] - p) for p in others)
                return l_j * mpmath.diff(lambda r: a_s * phi(rho[-1]) / phi(r), r)

            return float(mpmath.quad(part, [rho[-2], rho[-1]]))

        expected = [integral(j) for j in range(3)]
    assert weights_of_er_sde("er_sde_5", ts, 1.0) == pytest.approx(expected, rel=1e-11, abs=1e-13)


def weights_of_er_sde(scale, ts, eta):
    """Its linear part is another: it is read off with x_T alone in a further row."""
    process = ReverseSDE(VP(), OneHot(VP(), "data"), eta)
    x = torch.zeros(5, 1, dtype=DOUBLE)
    states = list(ERSDE(3, scale).solve(process, x, ts, lambda t, s: 0 * x))
    (_, before), (_, after) = states[-2:]
    process = ReverseSDE(VP(), GaussianData(VP(), line(0.0), line(0.0)), eta)
    kept = ERSDE(1, scale).step(process, x + 1, ts[-2], ts[-1], lambda t, s: 0 * x, None)[0]
    return (after - kept * before)[:3, 0].tolist()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_weights_of_steps_of_any_size_add_up(prediction):
    """A constant is integrated without error, in one step over the whole range as well."""
    for ts in (line(1.0, 0.9, 0.5, 1e-3), line(0.5, 0.49, 0.3), line(0.01, 0.009, 0.0)):
        one = weights(Multistep(prediction, "log_snr", 1), VP(), ts)[-1]
        made = weights(Multistep(prediction, "log_snr", 3, last="full"), VP(), ts)
        assert math.fsum(made) == pytest.approx(one, abs=1e-14 * sum(map(abs, made)))


def test_a_polynomial_is_integrated_to_sigma_zero_in_rho_time_and_angle():
    """Noise that is a parabola in the variable is integrated without error down to sigma = 0."""
    sde, ts = VP(), line(0.6, 0.5, 0.4, 0.0)
    for variable in ("rho", "time", "angle"):
        made = weights(Multistep("noise", variable, 3, last="full"), sde, ts)
        assert len([w for w in made if w]) == 3
        with mpmath.workdps(20):
            expected = exact_weights("noise", variable, line(0.6, 0.5, 0.4, 1e-30), 0.0)
        assert made == pytest.approx(expected, rel=1e-6)


# ---- named members


@names("sde", SDES)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_one_value_of_the_data_is_ddim(sde, eta):
    assert_same(run(Multistep("data", points=1), sde, eta), run(DDIM(), sde, eta))


@names("sde", SDES)
@pytest.mark.parametrize("prediction", ["noise", "v"])
def test_one_value_of_the_noise_is_ddim_and_of_v_is_not(sde, prediction):
    made, ddim = run(Multistep(prediction, points=1), sde), run(DDIM(), sde)
    if prediction == "noise":
        assert_same(made, ddim)
    elif isinstance(sde, VP) and not isinstance(sde, SubVP):
        assert 1e-3 < (made - ddim).abs().max() < 0.5


@names("sde", SDES)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_three_values_of_the_data_in_lambda_are_dpmpp_3m(sde, eta):
    engine = Multistep("data", "log_snr", 3, last="full")
    assert_same(run(engine, sde, eta), run(DPMpp3M(), sde, eta))


@names("sde", SDES)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_two_values_with_their_line_at_the_middle_are_dpmpp_2m(sde, eta):
    engine = Multistep("data", "log_snr", 2, line="middle", last="full")
    assert_same(run(engine, sde, eta), run(DPMpp2M(), sde, eta))


def test_published_3m_halves_the_second_difference():
    """Between the parabola, with weight 1, and the line, with weight 0, it stands in the middle."""
    ts = line(0.8, 0.55, 0.4, 0.2)
    line_2 = [0.0, *weights(Multistep("data", points=2, last="full"), VP(), ts[1:])]
    exact = weights(Multistep("data", points=3, last="full"), VP(), ts)
    corrected, published = (weights(DPMpp3M(p), VP(), ts) for p in (False, True))
    assert corrected == pytest.approx(exact, rel=1e-12)
    h = (VP().log_snr(ts).diff() / 2).tolist()
    decayed = math.expm1(-h[2])
    ramp = h[2] + decayed
    a_s = float(VP().alpha(ts[-1]))
    share = a_s * (h[2] ** 2 - 2 * ramp) / 2  # of D''
    second = [2 / (h[0] + h[1]) / h[0], -2 / (h[0] + h[1]) * (1 / h[0] + 1 / h[1])]
    second.append(2 / (h[0] + h[1]) / h[1])
    off = [p - c for p, c in zip(published, corrected, strict=True)]
    assert off == pytest.approx([-share * d / 2 for d in second], rel=1e-9)
    assert line_2 != pytest.approx(exact, rel=1e-3)


def test_published_3m_is_of_second_order_and_says_so():
    grid, steps = functools.partial(log_snr, t_max=0.6, t_min=0.02), [80, 160]
    solver = get("solver", "dpmpp_3m", published=True)
    measured = order(strong_errors(solver, VP(), steps, grid), steps)
    assert solver.order == 2 == pytest.approx(measured, abs=0.1)


class VeEuler:
    """k-diffusion's samplers as they are written: states x/alpha, levels rho."""

    def __init__(self, denoise):
        self.denoise = denoise

    def slope(self, y, rho):
        return (y - self.denoise(y, rho)) / rho

    def dpm_2(self, y, levels):
        for here, there in zip(levels, levels[1:], strict=False):
            middle = math.exp((math.log(here) + math.log(there)) / 2)
            half = y + self.slope(y, here) * (middle - here)
            y = y + self.slope(half, middle) * (there - here)
        return y

    def lms(self, y, levels, order=4):
        slopes = []
        for i, there in enumerate(levels[1:]):
            slopes = [self.slope(y, levels[i]), *slopes][:order]
            nodes = levels[max(0, i - order + 1) : i + 1][::-1]
            for j, slope in enumerate(slopes):
                part = mpmath.quad(
                    lambda u, j=j, nodes=nodes: mpmath.fprod(
                        (u - p) / (nodes[j] - p) for k, p in enumerate(nodes) if k != j
                    ),
                    [levels[i], there],
                )
                y = y + float(part) * slope
        return y


@pytest.mark.parametrize(
    ("method", "solver"), [("dpm_2", DPMSolver(2)), ("lms", get("solver", "lms", last="full"))]
)
@names("sde", (VP(), EDM()))
def test_dpm_solver_2_and_lms_are_k_diffusions(sde, method, solver):
    """In VE coordinates, whatever the SDE: midpoint in log sigma; Adams with exact integrals."""
    data, ts = MixtureData.five(sde), log_snr(sde, 8, t_max=0.5 * sde.T)
    a, s = sde.alpha(ts), sde.sigma(ts)

    def denoise(y, rho):
        t = sde.time_of_log_snr(torch.tensor(-2 * math.log(rho), dtype=DOUBLE))
        return data.denoise(sde.alpha(t) * y, t)

    x = sde.prior(torch.linspace(-2, 2, 8, dtype=DOUBLE).reshape(4, 2), ts[0])
    theirs = getattr(VeEuler(denoise), method)(x / a[0], (s / a).tolist()) * a[-1]
    ours = integrate(probability_flow(sde, data), x, ts, solver).x
    assert_same(ours, theirs, 1e-9)


def test_names_that_mean_one_and_the_same():
    for one, other in [
        ("lms", "deis_rhoab3"),
        ("dpm_solver_2m", "eab_noise_2"),
        ("dpm_solver_3m", "eab_noise_3"),
    ]:
        assert get("solver", one) == get("solver", other)
    assert get("solver", "unipc_2") == Multistep("data", "log_snr", 2, corrector=3, line="middle")
    assert get("solver", "unipc_v_3") == Multistep("v", "angle", 3, corrector=4, line="middle")
    assert get("solver", "sa_solver") == get("solver", "unipc_3", line="exact")
    assert_same(run(get("solver", "eab_data_3", last="full")), run(DPMpp3M()))


# ---- noise


def test_a_band_switches_the_noise_off_outside():
    sde, ts = EDM(), log_snr(EDM(), 20)
    law = [
        output_law(
            ReverseSDE(sde, GaussianData(sde, line(0.0), line(0.4)), 1.0),
            ts,
            Multistep("data", points=2, band=band),
            line(0.0),
            line(80.0**2),
        )[1]
        for band in ((0.0, math.inf), (1e4, 2e4), (0.05, 1.0))
    ]
    flow = output_law(
        probability_flow(sde, GaussianData(sde, line(0.0), line(0.4))),
        ts,
        Multistep("data", points=2),
        line(0.0),
        line(80.0**2),
    )[1]
    assert law[1] == flow != law[0] != law[2] != flow


@pytest.mark.parametrize("band", [(0.0, math.inf), (0.05, 1.0)])
def test_sa_solver_is_weakly_of_second_order_with_and_without_a_band(band):
    grid, steps = functools.partial(log_snr, t_max=0.6, t_min=0.02), [80, 160]
    errors = weak_errors(get("solver", "sa_solver", band=band), VP(), 1.0, steps, grid)
    assert abs(errors[1]) < 4e-4
    assert order(errors, steps) > 1.9


@names("sde", SDES)
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_every_member_keeps_one_point_data_at_any_eta(sde, eta):
    data, ts = GaussianData(sde, line(0.7), line(0.0)), log_snr(sde, 7, t_max=0.9 * sde.T)
    for solver in (Multistep("data", "rho", 3, 4), Multistep("data", "angle", 2), ERSDE(3)):
        mean, variance = output_law(ReverseSDE(sde, data, eta), ts, solver, *data.law(ts[0]))
        torch.testing.assert_close(mean, data.law(ts[-1])[0])
        torch.testing.assert_close(variance, data.law(ts[-1])[1], rtol=1e-9, atol=0)


# ---- elementwise schedules


class Coloured(VP):
    """VP with a schedule for each of two components."""

    def _integral(self, t):
        return super()._integral(t).unsqueeze(-1) * torch.tensor([1.0, 0.5], dtype=DOUBLE)


@pytest.mark.parametrize("variable", ["log_snr", "rho", "angle"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_elementwise_schedules_are_each_components_own(prediction, variable):
    ts, x = torch.linspace(0.6, 0.02, 7, dtype=DOUBLE), torch.ones(3, 2, dtype=DOUBLE)
    solver = Multistep(prediction, variable, 3, corrector=3, last="full")

    def run(sde, x):
        return integrate(probability_flow(sde, lambda x, t: -torch.tanh(x)), x, ts, solver).x

    alone = [run(sde, x[:, :1]) for sde in (VP(), VP(0.05, 10.0))]
    torch.testing.assert_close(run(Coloured(), x), torch.cat(alone, 1))


@pytest.mark.parametrize("options", [{"variable": "time"}, {"start": "single"}], ids=str)
def test_a_polynomial_in_time_and_single_steps_need_one_alpha(options):
    process = probability_flow(Coloured(), lambda x, t: -x)
    with pytest.raises(PairingError, match="elementwise schedules"):
        integrate(process, torch.ones(1, 2), line(0.5, 0.3), Multistep("noise", **options))


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction": "eps"}, "prediction='eps' is unknown"),
        ({"variable": "sigma"}, "variable='sigma' is unknown"),
        ({"start": "euler"}, "start='euler' is unknown"),
        ({"last": "first"}, "last='first' is unknown"),
        ({"line": "straight"}, "line='straight' is unknown"),
        ({"points": 0}, "points=0 must be at least 1"),
        ({"points": 2.5}, "points=2.5"),
        ({"corrector": -1}, "corrector=-1 must be at least 1"),
        ({"reach": 0.0}, "reach=0.0 must be > 0"),
        ({"band": (1.0, 0.5)}, "band=.* low < high"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_by_name(options, message):
    with pytest.raises(ArgumentError, match=message):
        Multistep(**options)


@pytest.mark.parametrize("make", [lambda: ERSDE(4), lambda: ERSDE(scale="er_sde_4")])
def test_er_sde_refuses_what_it_has_not(make):
    with pytest.raises(ArgumentError, match="points=4 must be|scale='er_sde_4' is unknown"):
        make()


@pytest.mark.parametrize("prediction", ["noise", "v"])
def test_noise_and_v_need_the_probability_flow(prediction):
    solver = Multistep(prediction)
    assert solver.weak_order is None
    process = ReverseSDE(VP(), lambda x, t: -x, 1.0)
    with pytest.raises(PairingError, match="is not deterministic"):
        integrate(process, torch.ones(1, 2), line(0.5, 0.3), solver)


def test_upwards_to_alpha_zero_noise_and_v_are_regular_and_data_are_refused_in_time():
    calls = []

    def score(x, t):
        calls.append(t)
        return -x

    process, ts = probability_flow(RectifiedFlow(), score), line(0.1, 0.5, 1.0)
    with pytest.raises(GridError, match="infinite coefficient"):
        integrate(process, torch.ones(1, 2), ts, Multistep("data"))
    assert not calls
    for solver in (Multistep("v", "angle"), Multistep("noise", "rho")):
        assert integrate(process, torch.ones(1, 2), ts, solver).x.isfinite().all()
