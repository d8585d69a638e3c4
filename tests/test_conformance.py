"""Properties of solvers, for random data, SDEs, eta and grids; the output law is exact.

On Gaussian data every linear solver makes (x_T, x_0) jointly Gaussian, and `output_law` reads that
law off without sampling. The solvers are isotropic, so a diagonal covariance is a general one in
its eigenbasis. Steps are measured in lambda = log(alpha/sigma), the clock that all the SDEs share.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Case, cases, numbers, times
from sdeflow_plugins.solvers.ddim import DDIM
from sdeflow_plugins.solvers.ddpm import DDPM
from sdeflow_plugins.solvers.dpmpp import DPMpp1S, DPMpp2M, DPMpp2S, exponential_euler

from sdeflow import VE, VP, EulerMaruyama, Heun, ReverseSDE, TorchDiffEq, TorchSDE, sample
from sdeflow.testing import GaussianData, output_law


def worst_error(solver, case):
    """Of mean, standard deviation and correlation with x_T, the largest error, each relative.

    Whitened, the eta-process is an Ornstein-Uhlenbeck process, and on N(m, v)
    corr(x_t, x_s) = exp(-eta^2 int dlambda / (1 + v e^(2 lambda))).
    """
    sde, ts, mean, variance, eta = case
    data = GaussianData(sde, mean, variance)
    process = ReverseSDE(sde, data, eta)
    (m_t, v_t), (m_s, v_s) = data.law(ts[0]), data.law(ts[-1])
    mean, made = output_law(process, ts, solver, m_t, v_t)
    _, fresh = output_law(process, ts, solver, m_t, 0 * v_t)
    t, s = sde.log_snr(ts[[0, -1]]) / 2
    start, end = (u - torch.log1p(variance * (2 * u).exp()) / 2 for u in (t, s))
    errors = (
        (mean - m_s) / (m_s**2 + v_s).sqrt(),
        (made / v_s).sqrt() - 1,
        ((made - fresh).clamp_min(0) / v_s).sqrt() - torch.exp(eta**2 * (start - end)),
    )
    return max(float(error.abs().max()) for error in errors)


def bound(solver, case):
    """C h^p, h the longest step in lambda."""
    c, p = BOUNDS[solver]
    return c * float((case.sde.log_snr(case.ts).diff() / 2).max()) ** p


BOUNDS = {
    # solver               C    p        the largest C seen in 2,000 random cases (back-ends: 400)
    EulerMaruyama(): (4.0, 1),  #        1.87
    Heun(): (2.0, 2),  #                 0.96
    DDIM(): (1.0, 1),  #                 0.48
    DDPM(): (1.0, 1),  #                 0.48
    DDPM("large"): (2.0, 1),  #          1.00
    DPMpp1S(): (1.0, 1),  #              0.48
    DPMpp2S(): (0.5, 2),  #              0.24
    DPMpp2M(): (0.5, 2),  #              0.23
    TorchSDE("euler"): (4.0, 1),  #      1.40
    TorchSDE("heun"): (1.5, 2),  #       0.61
    TorchSDE("srk"): (1.5, 2),  #        0.72
    TorchDiffEq("midpoint"): (1.0, 2),  # 0.41
    TorchDiffEq("rk4"): (0.03, 4),  #    0.010
}
ANY_ETA = (EulerMaruyama(), Heun(), DDIM(), DPMpp1S(), DPMpp2S(), DPMpp2M())


@pytest.mark.parametrize("solver", ANY_ETA, ids=repr)
@settings(max_examples=60)
@given(case=cases())
def test_the_output_law_is_the_target_within_the_order(solver, case):
    assert worst_error(solver, case) <= bound(solver, case)


@pytest.mark.parametrize("solver", [DDPM(), DDPM("large")], ids=repr)
@settings(max_examples=60)
@given(case=cases(etas=st.just(1.0)))
def test_the_output_law_of_ddpm_is_the_target_within_the_order(solver, case):
    assert worst_error(solver, case) <= bound(solver, case)


@pytest.mark.parametrize("method", ["euler", "heun", "srk"])
@settings(max_examples=8)
@given(case=cases(etas=numbers(0.2, 1), ratio=1.5, steps=(15, 40)))
def test_the_output_law_of_torchsde_is_the_target_within_the_order(method, case):
    assert worst_error(TorchSDE(method), case) <= bound(TorchSDE(method), case)


@pytest.mark.parametrize("method", ["midpoint", "rk4"])
@settings(max_examples=8)
@given(case=cases(etas=st.just(0.0), ratio=1.5, steps=(15, 40)))
def test_the_output_law_of_torchdiffeq_is_the_target_within_the_order(method, case):
    assert worst_error(TorchDiffEq(method), case) <= bound(TorchDiffEq(method), case)


# ---- planted faults, each in the place of the solver that it spoils


class SigmaOfTheWrongTime(DDIM):
    """sigma_t for sigma_s."""

    def step(self, process, x, t, s, noise, memory):
        data, sde = process.denoise(x, t), process.gaussian
        mean, std = sde.posterior(x, data, t, s, process.eta)
        wrong = sde.sigma(t) / sde.sigma(s)
        a = sde.alpha(s)
        return a * data + wrong * (mean - a * data) + wrong * std * noise(t, s), None


class VarianceForStd(DDIM):
    def step(self, process, x, t, s, noise, memory):
        mean, std = process.gaussian.posterior(x, process.denoise(x, t), t, s, process.eta)
        return mean + std**2 * noise(t, s), None


class EtaIgnored(DDIM):
    """The marginals are right; the joint law with x_T is that of the ODE."""

    def step(self, process, x, t, s, noise, memory):
        return process.gaussian.posterior(x, process.denoise(x, t), t, s, 0.0)[0], None


class EtaOfTheVariance(DDIM):
    """eta scales the variance, not the standard deviation."""

    def step(self, process, x, t, s, noise, memory):
        eta = math.sqrt(process.eta)
        mean, std = process.gaussian.posterior(x, process.denoise(x, t), t, s, eta)
        return mean + std * noise(t, s), None


class UsualPrint(DDIM):
    """The variance as usually printed, which alpha = 1 turns into zero, in a correct mean."""

    def step(self, process, x, t, s, noise, memory):
        sde = process.gaussian
        mean, std = sde.posterior(x, process.denoise(x, t), t, s, process.eta)
        v = (sde.sigma(s) / sde.sigma(t)) ** 2 * (1 - (sde.alpha(t) / sde.alpha(s)) ** 2)
        return mean + process.eta * v.clamp_min(0).sqrt() * noise(t, s), None


class NoiseForData(DPMpp1S):
    """The formula of the data prediction fed with the noise."""

    def step(self, process, x, t, s, noise, memory):
        a, sigma = process.gaussian.kernel(x, t)
        eps = (x - a * process.denoise(x, t)) / sigma
        return exponential_euler(process, x, eps, t, s)[0], None


class HalvedExtrapolation(DPMpp2M):
    def step(self, process, x, t, s, noise, memory):
        past, left = memory
        past = None if past is None else (past[0], 2 * past[1])
        return super().step(process, x, t, s, noise, (past, left))


class FirstOrder(DPMpp2M):
    def step(self, process, x, t, s, noise, memory):
        return super().step(process, x, t, s, noise, None)


class IndependentStage(DPMpp2S):
    """Fresh noise in the step where that of the stage is due."""

    def step(self, process, x, t, s, noise, memory):
        sde = process.gaussian
        m = sde.time_of_log_snr((sde.log_snr(t) + sde.log_snr(s)) / 2)
        stage, std = exponential_euler(process, x, process.denoise(x, t), t, m)
        data = process.denoise(stage + std * noise(t, m), m)
        mean, std = exponential_euler(process, x, data, t, s)
        return mean + std * noise(t, s), None


class KickAtTheEnd(Heun):
    """g taken at the end of the step."""

    def step(self, process, x, t, s, noise, memory):
        h = s - t
        first = process.drift(x, t)
        kick = h.abs().sqrt() * process.spread(x, s, noise(t, s))
        return x + h / 2 * (first + process.drift(x + h * first + kick, s)) + kick, None


class WrongSign(EulerMaruyama):
    """The reverse step with its drift added for a time step |h|, as popular articles print it."""

    def step(self, process, x, t, s, noise, memory):
        h = (s - t).abs()
        return x + h * process.drift(x, t) + h.sqrt() * process.spread(x, t, noise(t, s)), None


FAULTS = {
    SigmaOfTheWrongTime(): DDIM(),
    VarianceForStd(): DDIM(),
    EtaIgnored(): DDIM(),
    EtaOfTheVariance(): DDIM(),
    UsualPrint(): DDIM(),
    NoiseForData(): DPMpp1S(),
    HalvedExtrapolation(): DPMpp2M(),
    FirstOrder(): DPMpp2M(),
    IndependentStage(): DPMpp2S(),
    KickAtTheEnd(): Heun(),
    WrongSign(): EulerMaruyama(),
    EulerMaruyama(): Heun(),
}


@pytest.mark.parametrize(("fault", "solver"), FAULTS.items(), ids=repr)
def test_a_planted_fault_breaks_the_bound(fault, solver):
    sde = VE()
    mean, variance = torch.tensor([1.0, -1.0]).double(), torch.tensor([0.3, 2.0]).double()
    case = Case(sde, times(sde, -2.0, 3.0, [1.0] * 60), mean, variance, 0.6)
    assert worst_error(solver, case) <= bound(solver, case)
    assert worst_error(fault, case) > bound(solver, case)


# ---- exact statements

EXACT = (DDIM(), DPMpp1S(), DPMpp2S(), DPMpp2M())


@pytest.mark.parametrize("solver", (*EXACT, DDPM()), ids=repr)
@settings(max_examples=25)
@given(case=cases(steps=(1, 12), ratio=30.0, to_zero=True))
def test_one_point_data_are_kept_exactly(solver, case):
    """Whatever eta and the grid, t = 0 included."""
    sde, ts, mean, _, eta = case
    data = GaussianData(sde, mean, torch.zeros_like(mean))
    process = ReverseSDE(sde, data, 1.0 if isinstance(solver, DDPM) else eta)
    made = output_law(process, ts, solver, *data.law(ts[0]))
    for value, exact in zip(made, data.law(ts[-1]), strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fault", [DDPM("large"), SigmaOfTheWrongTime()], ids=repr)
def test_one_point_data_tell_a_wrong_variance(fault):
    data = GaussianData(VP(), torch.ones(1).double(), torch.zeros(1).double())
    ts = times(VP(), -2.0, 3.0, [1.0] * 10)
    _, made = output_law(ReverseSDE(VP(), data), ts, fault, *data.law(ts[0]))
    assert float(made / data.law(ts[-1])[1]) > 1.1


@settings(max_examples=25)
@given(case=cases(steps=(1, 12), ratio=30.0, to_zero=True))
def test_ddpm_is_ddim_at_eta_one_and_so_is_dpmpp_1s(case):
    sde, ts, mean, variance, _ = case
    process = ReverseSDE(sde, GaussianData(sde, mean, variance))
    ddpm, ddim, dpmpp = (
        sample(process, (4, 3), solver=solver, grid=ts, seed=1, dtype=torch.float64).x
        for solver in (DDPM(), DDIM(), DPMpp1S())
    )
    torch.testing.assert_close(ddpm, ddim, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(dpmpp, ddim, rtol=1e-11, atol=1e-11)


@settings(max_examples=25)
@given(case=cases(etas=st.just(0.0), steps=(1, 30)))
def test_ddim_is_a_product_of_cosines(case):
    """On N(0, v), where tan(theta) = sigma/(alpha sqrt(v)); eta = 0. MATH.md, section 1.2."""
    sde, ts, mean, variance, _ = case
    data = GaussianData(sde, 0 * mean, variance)
    _, made = output_law(ReverseSDE(sde, data, 0.0), ts, DDIM(), *data.law(ts[0]))
    tangent = torch.exp(-sde.log_snr(ts) / 2)[:, None] / variance.sqrt()
    shrink = tangent.atan().diff(dim=0).cos().prod(0)
    torch.testing.assert_close((made / data.law(ts[-1])[1]).sqrt(), shrink, rtol=1e-11, atol=0)
