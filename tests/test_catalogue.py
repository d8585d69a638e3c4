"""Every solver of the catalogue with every SDE, grid and prediction; and the samplers that are not
of the engine: ancestral, DDPM's variances, churn, Restart, predictor-corrector."""

import dataclasses
import functools
import math

import pytest
import torch
from problems import label
from sdeflow_plugins.solvers.ancestral import Ancestral
from sdeflow_plugins.solvers.ddim import DDIM
from sdeflow_plugins.solvers.ddpm import DDPM, noise_power
from sdeflow_plugins.solvers.dpm_solver import DPMSolver
from sdeflow_plugins.solvers.dpmpp import DPMpp2M, DPMpp2S, DPMpp3S
from sdeflow_plugins.solvers.edm import EDMHeun
from sdeflow_plugins.solvers.multistep import Multistep
from sdeflow_plugins.solvers.pc import PredictorCorrector
from sdeflow_plugins.solvers.pndm import PNDM
from sdeflow_plugins.solvers.res import RES2S
from sdeflow_plugins.solvers.restart import Restart
from sdeflow_plugins.solvers.seeds import SEEDS
from ztest import LIMIT, z_of_variance

from sdeflow import (
    EDM,
    OU,
    VE,
    VP,
    Cosine,
    Denoiser,
    GaussianSDE,
    RectifiedFlow,
    ReverseSDE,
    SubVP,
    catalogue,
    get,
    integrate,
    probability_flow,
    reverse,
    sample,
)
from sdeflow.denoiser import PREDICTIONS
from sdeflow.errors import ArgumentError, GridError, PairingError
from sdeflow.grid import karras, log_snr
from sdeflow.testing import GaussianData, MixtureData, order, output_law, strong_errors, weak_errors

DOUBLE = torch.float64


class Users(GaussianSDE):
    """A user's own, from alpha and sigma alone: neither VP nor VE."""

    t_min = 1e-3

    def alpha(self, t):
        return 1 / (1 + t)

    def sigma(self, t):
        return torch.sinh(2 * t)


SDES = (VP(), SubVP(), VE(), Cosine(), EDM(), RectifiedFlow(), OU(), Users())
OWN = {n for n, entry in catalogue("solver").items() if entry.distribution == "sdeflow"}
STEPPERS = sorted(n for n in OWN if not n.startswith(("torch", "adaptive", "gddim")))
GRIDS = sorted(n for n, entry in catalogue("grid").items() if entry.distribution == "sdeflow")
MID = functools.partial(log_snr, t_max=0.6, t_min=0.02)


def line(*numbers):
    return torch.tensor(numbers, dtype=DOUBLE)


class Net:
    """An exact network of Gaussian data N(0, 1/4), of any prediction, that counts."""

    def __init__(self, sde, prediction):
        self.sde, self.prediction, self.calls = sde, prediction, 0
        self.data = GaussianData(sde, line(0.0), line(0.25))

    def __call__(self, x, t):
        self.calls += 1
        t = t.double()[0]
        if self.prediction == "edm":
            t = self.sde.time_of_log_snr(-8 * t)
        row = PREDICTIONS[self.prediction](self.sde, t, 0.5)
        x = x if row.c_in is None else x / row.c_in
        a, s = self.sde.kernel(x, t)
        data = self.data.denoise(x, t)
        return row.p * data + row.q * ((x - a * data) / s)


def tried(sde, solver, grid, prediction, steps=6):
    """The samples, or the refusal, which must come before the first evaluation."""
    net = Net(sde, prediction)
    eta = 1.0 if "eta=1" in solver.needs else 0.0 if "ode" in solver.needs else 0.6
    process = ReverseSDE(sde, Denoiser(net, sde, prediction), eta)
    try:
        run = sample(process, (32,), solver=solver, grid=grid, steps=steps, seed=1, dtype=DOUBLE)
    except (PairingError, GridError) as refusal:
        assert net.calls == 0, f"refused after {net.calls} evaluations: {refusal}"
        return None
    assert run.nfe == net.calls
    return run.x


# ---- everything with everything


@pytest.mark.parametrize("name", STEPPERS)
def test_a_solver_runs_on_every_gaussian_sde_with_every_grid_and_prediction(name):
    """Each with all grids and predictions, the SDEs going round, in 6 steps: finite, and at most
    ten times the level of noise it began with. Then with all SDEs, in 30 steps: the variance is
    1/4, or near it."""
    solver = get("solver", name)
    core = name in {"euler_maruyama", "milstein", "euler_heun", "heun", "srk", "platen"}
    refused = []
    for k, grid in enumerate(GRIDS):
        sde = SDES[(k + sum(map(ord, name))) % len(SDES)]
        prediction = list(PREDICTIONS)[k % len(PREDICTIONS)]
        x = tried(sde, solver, grid, prediction)
        if x is None:
            refused.append((type(sde).__name__, grid))
            continue
        t = torch.tensor(0.999 * sde.T)
        bound = math.inf if core else 10 * float(sde.sigma(t) / sde.alpha(t))
        assert x.isfinite().all() and float(x.std()) < bound, (sde, grid, prediction)
    assert len(refused) <= (8 if core else 3), refused
    for sde in SDES:
        x = tried(sde, solver, functools.partial(log_snr, t_max=0.98 * sde.T), "data", 30)
        assert x is not None and x.isfinite().all()
        if not core:  # those are of low order in t, where schedules are steep
            assert 0.1 < float(x.var()) < 0.5, (sde, float(x.var()))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_makes_the_same_samples(prediction):
    """As far as rounding goes: what is integrated is D, whatever the network says."""
    for sde in (VP(), EDM(), RectifiedFlow()):
        made, data = (
            tried(sde, Multistep(points=3, corrector=4), log_snr(sde, 10, t_max=0.98 * sde.T), p)
            for p in (prediction, "data")
        )
        torch.testing.assert_close(made, data, rtol=1e-6, atol=1e-6)


# ---- single steps


def test_dpm_solver_3_is_the_papers_formula():
    sde, data = VP(), MixtureData.five(VP())
    process, x = probability_flow(sde, data), line([0.3, -1.0], [1.2, 0.4])
    t, s = line(0.5, 0.3)
    lam_t, lam_s = (sde.log_snr(u) / 2 for u in (t, s))
    h, r1, r2 = lam_s - lam_t, 1 / 3, 2 / 3
    t1, t2 = (sde.time_of_log_snr(2 * (lam_t + r * h)) for r in (r1, r2))

    def eps(x, u):
        return -sde.sigma(u) * data(x, u)

    def ratio(u):
        return sde.alpha(u) / sde.alpha(t)

    e = torch.expm1
    e0 = eps(x, t)
    u1 = ratio(t1) * x - sde.sigma(t1) * e(r1 * h) * e0
    d1 = eps(u1, t1) - e0
    u2 = ratio(t2) * x - sde.sigma(t2) * e(r2 * h) * e0
    u2 = u2 - sde.sigma(t2) * r2 / r1 * (e(r2 * h) / (r2 * h) - 1) * d1
    d2 = eps(u2, t2) - e0
    end = ratio(s) * x - sde.sigma(s) * e(h) * e0 - sde.sigma(s) / r2 * (e(h) / h - 1) * d2
    made, _ = DPMSolver(3).step(process, x, t, s, None, None)
    torch.testing.assert_close(made, end, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
def test_seeds_on_the_flow_is_dpm_solver(sde, stages):
    process, ts = probability_flow(sde, MixtureData.five(sde)), log_snr(sde, 6, t_max=0.9 * sde.T)
    x = sde.prior(line([0.3, -1.0], [1.2, 0.4]), ts[0])
    torch.testing.assert_close(
        integrate(process, x, ts, SEEDS(stages)).x, integrate(process, x, ts, DPMSolver(stages)).x
    )


def test_er_sde_on_the_flow_is_one_ode_solver_whatever_its_scale():
    process = probability_flow(VP(), MixtureData.five(VP()))
    x, ts = line([0.3, -1.0], [1.2, 0.4]), MID(VP(), 6)
    engine = integrate(process, x, ts, Multistep("data", "rho", 3, last="full")).x
    for scale in ("sde", "er_sde_1", "er_sde_5"):
        made = integrate(process, x, ts, get("solver", "er_sde_3", scale=scale)).x
        torch.testing.assert_close(made, engine, rtol=1e-10, atol=1e-10)


def test_res_meets_the_stiff_conditions_that_dpmpp_2s_does_not():
    """Their orders are the same; with the stage at the middle RES is well below in error, and with
    the stage at the end it is Heun's method in the exponential sense."""
    steps = [20, 40]
    res, dpm = (strong_errors(s, VP(), steps, log_snr) for s in (RES2S(), DPMpp2S()))
    assert all(a < 0.7 * b for a, b in zip(res, dpm, strict=True))
    assert order(strong_errors(RES2S(1.0), VP(), [80, 160], MID), [80, 160]) == pytest.approx(
        2, abs=0.1
    )
    with pytest.raises(ArgumentError, match=r"c=0 must be in \(0, 1\]"):
        RES2S(0)


# ---- ancestral


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
def test_ancestral_ddim_is_ddim(sde, eta):
    ts = torch.cat((log_snr(sde, 6, t_max=0.9 * sde.T), line(0.0)))
    process = ReverseSDE(sde, MixtureData.five(sde), eta)
    x = sde.prior(line([0.3, -1.0], [1.2, 0.4]), ts[0])
    a, b = (integrate(process, x, ts, solver, seed=2).x for solver in (Ancestral(DDIM()), DDIM()))
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


class Naive(Ancestral):
    """The planted fault: the noise that is added taken as a variance."""

    def step(self, process, x, t, s, noise, memory):
        up2 = process.eta**2 * -torch.expm1(
            process.gaussian.log_snr(t) - process.gaussian.log_snr(s)
        )

        def wrong(t, s):
            return noise(t, s) * up2.sqrt()

        return super().step(process, x, t, s, wrong, memory)


@pytest.mark.parametrize("inner", [DPMSolver(2), DPMpp2S(), EDMHeun()], ids=lambda s: repr(s)[:9])
def test_ancestral_is_weakly_of_second_order_and_the_naive_one_is_not(inner):
    steps = [40, 80]
    for eta in (0.5, 1.0):
        right = weak_errors(Ancestral(inner), VP(), eta, steps, MID)
        assert abs(right[1]) < 3e-3 and order(right, steps) == pytest.approx(2, abs=0.15)
    assert abs(weak_errors(Naive(inner), VP(), 1.0, steps, MID)[1]) > 0.1


def test_ancestral_and_restart_take_one_step_solvers_of_odes_alone():
    for wrong in (DDPM(), "dpm_2", EDMHeun(churn=10.0), None):
        for kind in (Ancestral, Restart):
            with pytest.raises(ArgumentError, match="inner=.* must be a one-step solver for ODEs"):
                kind(inner=wrong)
    calls = []

    def score(x, t):
        calls.append(t)
        return -x

    for wrong in (DPMpp2M(), Multistep()):
        for solver, eta in ((Ancestral(wrong), 1.0), (Restart(inner=wrong), 0.0)):
            with pytest.raises(ArgumentError, match="remembers earlier steps"):
                integrate(ReverseSDE(VP(), score, eta), torch.ones(1, 2), log_snr(VP(), 5), solver)
    assert not calls


# ---- DDPM's variances


@pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize("to_zero", [False, True])
def test_analytic_ddpm_is_exact_on_isotropic_gaussians(sde, to_zero):
    """In any number of steps, where both fixed variances are off."""
    mean, variance = line(0.3, -1.0), line(0.4, 0.4)
    data = GaussianData(sde, mean, variance)

    def power(t):
        a, s = sde.alpha(t), sde.sigma(t)
        return s**2 / (a**2 * 0.4 + s**2)

    top = 0.98 * sde.T
    for steps in (1, 2, 5):
        ts = log_snr(sde, steps + to_zero, t_max=top, to_zero=to_zero)
        end_mean, end_variance = data.law(ts[-1])
        exact = output_law(reverse(sde, data), ts, DDPM("analytic", power), *data.law(ts[0]))
        torch.testing.assert_close(exact[0], end_mean)
        if to_zero:  # the last step adds no noise: the law is that of D at the last level
            continue
        torch.testing.assert_close(exact[1], end_variance, rtol=1e-9, atol=0)
        small, large = (
            output_law(reverse(sde, data), ts, DDPM(kind), *data.law(ts[0]))[1]
            for kind in ("small", "large")
        )
        assert (small < end_variance * 0.999).all() and (large > end_variance * 1.001).all()


def test_noise_power_is_the_closed_form_on_gaussian_data():
    """E |eps|^2 = sigma^2/(alpha^2 v + sigma^2), a component: 20,000 numbers a time, at 5 standard
    errors; a false alarm once in 1.7 million times."""
    sde = VP()
    data = GaussianData(sde, line(0.0), line(0.4))

    def net(x, t):
        return data.denoise(x, t.double()[0])

    ts = karras(sde, 12, to_zero=True)
    x0 = 0.4**0.5 * torch.randn(5000, 4, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    power = noise_power(Denoiser(net, sde, "data"), x0, ts)
    for t in ts[:-1]:
        a, s = sde.alpha(t), sde.sigma(t)
        exact = float(s**2 / (a**2 * 0.4 + s**2))
        assert abs(float(power(t)) / exact - 1) < LIMIT * math.sqrt(2 / x0.numel())
    between = power((ts[3] + ts[4]) / 2)
    assert min(power(ts[3]), power(ts[4])) < between < max(power(ts[3]), power(ts[4]))
    assert float(power(line(0.0)[0])) == float(power(ts[-2]))
    one = noise_power(Denoiser(net, sde, "data"), x0, ts[-2:])
    assert float(one(ts[0])) == pytest.approx(float(power(ts[-2])), rel=0.05)
    process = reverse(sde, Denoiser(net, sde, "data"))
    run = integrate(process, sde.prior(torch.randn(10, 4)), ts, DDPM("analytic", power), seed=0)
    assert run.fused and run.x.isfinite().all()


@pytest.mark.parametrize("options", [{"variance": "analytic"}, {"power": lambda t: t}], ids=label)
def test_the_analytic_variance_and_its_power_go_together(options):
    with pytest.raises(ArgumentError, match=r"measure it with noise_power\(denoiser, x0, ts\)"):
        DDPM(**options)


# ---- churn and Restart


def flow_law(solver, sde=None, steps=40, variance=0.4):
    sde = sde or EDM()
    data = GaussianData(sde, line(0.2), line(variance))
    ts = karras(sde, steps)
    mean, var = output_law(probability_flow(sde, data), ts, solver, *data.law(ts[0]))
    true_mean, true_var = data.law(ts[-1])
    return float(var / true_var - 1), float(mean - true_mean)


def test_churn_is_exact_in_law_and_scaled_noise_is_not():
    """With s_noise = 1 the error is of second order in the steps; EDM's 1.007 stays."""
    steps = [160, 320]
    plain, scaled = (
        [flow_law(EDMHeun(40.0, s_noise=s), steps=n)[0] for n in steps] for s in (1.0, 1.007)
    )
    assert order(plain, steps) == pytest.approx(2, abs=0.2)
    assert abs(plain[1]) < 3e-3 and abs(scaled[1]) > 5 * abs(plain[1])
    assert order(scaled, steps) < 1


def test_churn_stays_within_its_range_and_below_the_last_level():
    for solver in (EDMHeun(40.0, 1e4, 2e4), EDMHeun(0.0, s_noise=1.003)):
        assert flow_law(solver) == flow_law(EDMHeun())
    times = []

    def score(x, t):
        times.append(float(t))
        return -x / (1 + t**2)

    process = probability_flow(EDM(), score)
    x, ts = torch.ones(1, 2), karras(EDM(), 8)
    integrate(process, x, ts, EDMHeun(40.0), seed=0)
    assert max(times) == 80.0 and len({*times} - {*ts.tolist()}) >= 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"churn": -1.0}, "churn=-1.0 must be finite and >= 0"),
        ({"s_noise": math.inf}, "s_noise=inf must be finite"),
        ({"s_min": 2.0, "s_max": 1.0}, "s_max=1.0 must be at least s_min=2.0"),
    ],
    ids=str,
)
def test_wrong_churn_is_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        EDMHeun(**options)


def test_restart_is_exact_in_law_and_contracts_what_went_wrong_above():
    """Its error is of the solver's order; begun with the wrong variance, it ends nearer."""
    steps = [40, 80]
    errors = [flow_law(Restart(), steps=n)[0] for n in steps]
    assert order(errors, steps) == pytest.approx(2, abs=0.4)
    sde, data = EDM(), GaussianData(EDM(), line(0.0), line(0.4))
    process, ts = probability_flow(sde, data), karras(EDM(), 40)
    wrong = 1.3 * data.law(ts[0])[1]
    off = {
        solver: float(
            output_law(process, ts, solver, line(0.0), wrong)[1] / data.law(ts[-1])[1] - 1
        )
        for solver in (EDMHeun(), Restart(((0.3, 20.0, 3, 0),)))
    }
    plain, restarted = off.values()
    assert plain > 0.25 and restarted < 0.1 * plain


def test_restart_of_the_wrong_kernel_does_not_converge():
    """The planted fault: the noise of the way up is that of VE, without the shrinking of x."""

    class Wrong(Restart):
        def step(self, process, x, t, s, noise, memory):
            def more(t, s):
                return 1.5 * noise(t, s)

            return super().step(process, x, t, s, more, memory)

    assert abs(flow_law(Wrong(((0.3, 2.0, 2, 0),)), VP())[0]) > 0.1
    assert abs(flow_law(Restart(((0.3, 2.0, 2, 0),)), VP())[0]) < 0.03


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_restart_costs_what_its_intervals_say_and_reaches_sigma_zero(steps):
    process = probability_flow(EDM(), GaussianData(EDM(), line(0.0), line(0.25)))
    x, solver = torch.ones(4, 1, dtype=DOUBLE), Restart(((0.06, 0.3, 2, 3),))
    run = integrate(process, x, karras(EDM(), steps, to_zero=True), solver, seed=0)
    assert run.x.isfinite().all()
    plain = 2 * steps - 1
    last = 5 if steps == 1 else 6  # three steps of Heun's, of which Euler's is one at sigma = 0
    assert run.nfe == plain + 2 * last


@pytest.mark.parametrize("interval", [(0.3, 0.06, 4, 0), (0.0, 1.0, 4, 0), (0.1, 0.3, 0, 0)])
def test_wrong_intervals_are_refused(interval):
    with pytest.raises(ArgumentError, match="an entry is"):
        Restart((interval,))


def test_a_restart_from_beyond_the_last_level_is_refused_in_time():
    calls = []

    def score(x, t):
        calls.append(t)
        return -x

    with pytest.raises(GridError, match="the level 100.0 is at t="):
        integrate(
            probability_flow(EDM(), score),
            torch.ones(1, 2),
            karras(EDM(), 5),
            Restart(((0.1, 100.0, 1, 0),)),
        )
    assert not calls


# ---- predictor-corrector


class BatchMeans(PredictorCorrector):
    """The planted fault, and the usual code: the norms are means over the batch."""

    def step(self, process, x, t, s, noise, memory):
        x, memory = self.predictor.step(process, x, t, s, noise, memory)
        (a_s, s_s), z = process.gaussian.kernel(x, s), noise(t, s)
        score = (a_s * process.denoise(x, s) - x) / s_s**2
        norm = z.flatten(1).norm(dim=1).mean() / score.flatten(1).norm(dim=1).mean()
        size = (self.snr * norm) ** 2
        return x + 2 * size * score + 2 * size**0.5 * z, memory


@pytest.mark.parametrize(
    ("solver", "independent"),
    [(PredictorCorrector(), True), (BatchMeans(), False)],
    ids=["sample", "batch"],
)
def test_a_sample_does_not_depend_on_its_batch_mates(solver, independent):
    sde = VP()
    process, ts = reverse(sde, MixtureData.five(sde)), log_snr(sde, 6)
    many, few = (
        sample(process, (n, 2), solver=solver, grid=ts, seed=4, dtype=DOUBLE).x for n in (8, 3)
    )
    assert torch.equal(many[:3], few) is independent


@pytest.mark.parametrize("norm", ["sample", "sigma"])
@pytest.mark.parametrize("corrections", [1, 2])
def test_langevin_steps_keep_the_variance_up_to_their_bias(norm, corrections):
    """In 64 dimensions: a bias of order snr^2; 8,000 numbers at 5 standard errors beside it."""
    sde = VP()
    data = GaussianData(sde, line(0.0), line(0.4))
    solver = PredictorCorrector(corrections=corrections, snr=0.1, norm=norm)
    run = sample(
        reverse(sde, data), (125, 64), solver=solver, grid=log_snr(sde, 60), seed=0, dtype=DOUBLE
    )
    assert run.nfe == 60 * (1 + corrections)
    assert run.fused is (norm == "sigma")
    variance = float(data.law(line(sde.t_min))[1])
    assert abs(float(run.x.var()) / variance - 1) < 0.15 + LIMIT * math.sqrt(2 / 8000)
    assert abs(z_of_variance(run.x.flatten(), 2 * variance)) > LIMIT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictor": "ddim"}, "predictor='ddim' must be a solver with a step"),
        ({"corrections": 0}, "corrections=0 must be at least 1"),
        ({"snr": 0.0}, "snr=0.0 must be > 0"),
        ({"norm": "batch"}, "norm='batch' is unknown"),
    ],
    ids=str,
)
def test_a_wrong_corrector_is_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        PredictorCorrector(**options)


# ---- PNDM, and what else is refused


def test_pndm_starts_with_four_evaluations_a_step():
    process = probability_flow(VP(), MixtureData.five(VP()))
    x, solver = torch.ones(2, 2, dtype=DOUBLE), get("solver", "pndm")
    assert integrate(process, x, MID(VP(), 10), solver).nfe == 10 + 3 * 3
    assert integrate(process, x, line(0.5, 0.3, 0.0), solver).nfe == 4 + 1


@pytest.mark.parametrize("points", [2, 3, 4])
def test_ipndm_is_of_second_order_on_graded_grids(points):
    steps = [160, 320]
    errors = strong_errors(PNDM(points), VP(), steps, MID)
    assert PNDM(points).order == 2 and order(errors, steps) == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize(
    "make", [lambda: DPMSolver(4), lambda: SEEDS(0), lambda: PNDM(5), lambda: PNDM(3, "euler")]
)
def test_what_a_solver_has_not_is_refused(make):
    with pytest.raises(ArgumentError, match="must be 1, 2|is unknown"):
        make()


def test_every_solver_of_the_catalogue_is_a_frozen_value_that_says_how_it_is_built():
    for name in STEPPERS:
        solver = get("solver", name)
        assert dataclasses.is_dataclass(solver) and hash(solver) == hash(get("solver", name))
        assert solver.order is not None or solver.weak_order is not None
        assert catalogue("solver")[name].summary
    assert DPMpp3S().order == 3
