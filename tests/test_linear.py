"""`LinearSDE`: a kernel from f and g alone, to rounding, against closed forms at 40 digits.

Errors are relative, in units of 1: at t from 1e-5 to T, the worst of 150 times.
"""

import copy
import math
import pickle
from dataclasses import dataclass

import mpmath
import pytest
import torch
from hypothesis import given
from problems import label, numbers
from sdeflow_plugins.solvers.ddim import DDIM

from sdeflow import (
    VE,
    VP,
    ArgumentError,
    Cosine,
    Denoiser,
    LinearSDE,
    ReverseSDE,
    catalogue,
    encode,
    get,
    integrate,
    probability_flow,
    sample,
)
from sdeflow.errors import ShapeError
from sdeflow.grid import GRIDS, log_snr
from sdeflow.tableau import _key
from sdeflow.testing import GaussianData

D = torch.float64
RATE, W = 2 * math.log(5000), math.pi / 2 / 1.008


@dataclass(frozen=True)
class RateVP(LinearSDE):
    """VP written the other way."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    T: float = 1.0
    t_min: float = 1e-3

    def f(self, t):
        return -0.5 * (self.beta_min + (self.beta_max - self.beta_min) * t)

    def g(self, t):
        return (self.beta_min + (self.beta_max - self.beta_min) * t) ** 0.5


def cosine_rate(t):
    return -W * torch.tan(W * (t + 0.008))


RATE_VE = LinearSDE(lambda t: 0.0, lambda t: 0.01 * math.sqrt(RATE) * torch.exp(RATE / 2 * t))
RATE_COSINE = LinearSDE(cosine_rate, lambda t: (-2 * cosine_rate(t)).sqrt(), T=0.999)


def vp(t):
    b = t * (mpmath.mpf(0.1) + mpmath.mpf(19.9) * t / 2)
    return mpmath.exp(-b / 2), mpmath.sqrt(-mpmath.expm1(-b))


def ve(t):
    g2, rate = mpmath.mpf(0.01 * math.sqrt(RATE)) ** 2, mpmath.mpf(RATE)
    return mpmath.mpf(1), mpmath.sqrt(g2 * mpmath.expm1(rate * t) / rate)


def cosine(t):
    w, s = mpmath.mpf(W), mpmath.mpf(0.008)
    alpha = mpmath.cos(w * (t + s)) / mpmath.cos(w * s)
    return alpha, mpmath.sqrt(1 - alpha**2)


def worst_error(sde, exact):
    times = torch.cat((torch.logspace(-5, 0, 100, dtype=D), torch.linspace(0.02, 1, 50, dtype=D)))
    t = (times * sde.T).clamp(max=sde.T)
    with mpmath.workdps(40):
        pairs = zip(t.tolist(), sde.alpha(t).tolist(), sde.sigma(t).tolist(), strict=True)
        errors = []
        for u, alpha, sigma in pairs:
            a, s = exact(mpmath.mpf(u))
            errors += [abs(alpha / a - 1), abs(sigma / s - 1)]
        return float(max(errors))


CASES = {
    # case      SDE, closed form, bound        measured
    "VP": (RateVP(), vp, 2e-15),  #            9.1e-16, 2 panels
    "VE": (RATE_VE, ve, 2e-15),  #             4.7e-16, 2 panels
    "cosine": (RATE_COSINE, cosine, 1e-13),  # 4.1e-14, 20 panels; its own conditioning is 1e-13
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_closed_form_to_rounding(name):
    sde, exact, bound = CASES[name]
    assert worst_error(sde, exact) < bound


class Subtracting(RateVP):
    """The planted fault: sigma from alpha, as 1 - alpha^2, which cancels near the data."""

    def moments(self, t):
        log_alpha, _ = super().moments(t)
        return log_alpha, 1 - torch.exp(2 * log_alpha)


class Trapezoid(RateVP):
    """The planted fault: 1,000 trapezia."""

    def moments(self, t):
        u = t.unsqueeze(-1) * torch.linspace(0, 1, 1001, dtype=D)
        decay = torch.cumulative_trapezoid(self.f(u), u, dim=-1)
        decay = torch.nn.functional.pad(decay, (1, 0))
        inner = torch.exp(2 * (decay[..., -1:] - decay)) * self.g(u) ** 2
        return decay[..., -1], torch.trapezoid(inner, u, dim=-1)


@pytest.mark.parametrize("faulty", [Subtracting(), Trapezoid()], ids=lambda sde: type(sde).__name__)
def test_the_accuracy_test_rejects_lesser_ways(faulty):
    assert worst_error(faulty, vp) > 1e-11


@given(theta=numbers(-2, 2), volatility=numbers(0.1, 3), T=numbers(0.1, 10), u=numbers(1e-8, 1))
def test_constant_rates_give_ornstein_uhlenbeck_stable_or_not(theta, volatility, T, u):
    sde = LinearSDE(lambda t: -theta, lambda t: volatility, T=T, t_min=0.0)
    t = torch.tensor(T * u, dtype=D)
    with mpmath.workdps(40):
        th, time = mpmath.mpf(theta), mpmath.mpf(float(t))
        spread = -mpmath.expm1(-2 * th * time) / (2 * th) if theta else time
        alpha, sigma = mpmath.exp(-th * time), mpmath.mpf(volatility) * mpmath.sqrt(spread)
        bound = 1e-15 * (4 + abs(theta) * T)
        assert abs(float(sde.alpha(t)) / alpha - 1) < bound
        assert abs(float(sde.sigma(t)) / sigma - 1) < bound


@given(at=numbers(0.1, 0.9), low=numbers(0.1, 1), high=numbers(2, 20))
def test_a_jump_in_the_schedule_is_found(at, low, high):
    def beta(t):
        return torch.where(t < at, low * torch.ones_like(t), high * torch.ones_like(t))

    sde = LinearSDE(lambda t: -beta(t) / 2, lambda t: beta(t).sqrt())
    t = torch.tensor([0.05, at, 1.0], dtype=D)
    integral = low * t.clamp(max=at) + high * (t - at).clamp_min(0)
    torch.testing.assert_close(sde.alpha(t), torch.exp(-integral / 2), rtol=1e-11, atol=0)
    torch.testing.assert_close(sde.sigma(t), (-torch.expm1(-integral)).sqrt(), rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_the_log_snr_is_precise_at_both_ends_and_inverted(name):
    sde = CASES[name][0]
    t = torch.logspace(-9, 0, 60, dtype=D) * sde.T
    snr = sde.log_snr(t)
    assert (snr.diff() < 0).all()
    torch.testing.assert_close(sde.time_of_log_snr(snr), t, rtol=1e-13, atol=0)
    near = sde.log_snr(torch.tensor([1e-9], dtype=D))  # where sigma^2 = g(0)^2 t
    g2 = sde.rates(torch.zeros((), dtype=D))[1]
    torch.testing.assert_close(near, -torch.log(g2 * 1e-9).reshape(1), rtol=1e-7, atol=0)


def test_a_log_snr_survives_where_alpha_underflows():
    sde = LinearSDE(lambda t: -500.0, lambda t: 1.0, T=4.0)
    t = torch.tensor([4.0], dtype=D)
    assert sde.alpha(t) == 0
    torch.testing.assert_close(sde.log_snr(t), torch.tensor([-4000 + math.log(1000)], dtype=D))


def test_rates_and_slopes_are_closed_forms_and_agree_with_autograd():
    sde, t = RateVP(), torch.tensor([0.01, 0.3, 0.99], dtype=D)
    for mine, theirs in zip(
        sde.rates(t) + sde.slopes(t), VP().rates(t) + VP().slopes(t), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
    u = t.clone().requires_grad_()
    slope = torch.autograd.grad(sde.sigma(u).sum(), u)[0]
    torch.testing.assert_close(slope, VP().slopes(t)[1], rtol=1e-12, atol=1e-13)


# ---- gradients, and nothing stale


def learnt(beta_max):
    return LinearSDE(
        lambda t: -0.5 * (0.1 + (beta_max - 0.1) * t), lambda t: (0.1 + (beta_max - 0.1) * t) ** 0.5
    )


def gradients(sde, beta_max, t):
    return [torch.autograd.grad(v.sum(), beta_max)[0] for v in (sde.alpha(t), sde.sigma(t))]


def test_gradients_in_a_parameter_are_those_of_the_closed_form():
    t = torch.tensor([1e-4, 0.2, 0.7, 1.0], dtype=D)
    beta_max = torch.tensor(20.0, dtype=D, requires_grad=True)
    closed = VP.__new__(VP)
    for name, value in {"beta_min": 0.1, "beta_max": beta_max, "T": 1.0}.items():
        object.__setattr__(closed, name, value)
    sde = learnt(beta_max)
    for mine, theirs in zip(
        gradients(sde, beta_max, t), gradients(closed, beta_max, t), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)
    assert not any(v.requires_grad for v in (*sde.panels.before, *sde.panels.seen))


def test_a_parameter_that_moves_leaves_nothing_stale():
    t = torch.tensor([0.3, 0.9], dtype=D)
    beta_max = torch.tensor(20.0, dtype=D, requires_grad=True)
    sde = learnt(beta_max)
    sde.sigma(t)
    for value in (5.0, 20.5):
        with torch.no_grad():
            beta_max.fill_(value)
            exact = VP(beta_max=value)
            torch.testing.assert_close(sde.sigma(t), exact.sigma(t), rtol=1e-14, atol=0)
        torch.testing.assert_close(sde.alpha(t), exact.alpha(t), rtol=1e-14, atol=0)


def test_an_optimiser_finds_the_schedule():
    target, t = VP(beta_max=12.0), torch.linspace(0.05, 1, 8, dtype=D)
    beta_max = torch.tensor(20.0, dtype=D, requires_grad=True)
    sde = learnt(beta_max)
    optimiser = torch.optim.Adam([beta_max], lr=0.5)
    for _ in range(60):
        optimiser.zero_grad()
        (sde.log_snr(t) - target.log_snr(t)).square().mean().backward()
        optimiser.step()
    assert abs(beta_max.item() - 12) < 0.3


# ---- as any other Gaussian SDE


@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_is_that_of_the_closed_form(name):
    torch.testing.assert_close(
        GRIDS[name](RateVP(), 12), GRIDS[name](VP(), 12), rtol=1e-12, atol=1e-15
    )


def solvers():
    own = {name: get("solver", name) for name, entry in catalogue("solver").items()}
    return [name for name, solver in own.items() if "system" not in solver.needs]


def runs(solver, process, x, ts):
    try:
        solver.check(process)
        return integrate(process, x, ts, solver, seed=3).x
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("name", solvers())
def test_every_solver_runs_it_as_the_closed_form(name):
    options = {"rtol": 0.1, "atol": 0.1} if name == "adaptive" else {}
    solver, x = get("solver", name, **options), torch.linspace(-2, 2, 6, dtype=D).reshape(2, 3)
    ts = torch.linspace(0.9, 0.1, 7, dtype=D)
    mean, variance = torch.zeros(3, dtype=D), torch.full((3,), 0.3, dtype=D)
    for eta in (0.0, 1.0) if solver.order or not solver.adaptive else ():
        results = [
            runs(solver, ReverseSDE(sde, GaussianData(sde, mean, variance), eta), x, ts)
            for sde in (RateVP(), VP())
        ]
        if isinstance(results[1], type):
            assert results[0] is results[1]
        else:
            torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


def test_denoisers_tableaux_sampling_and_encoding_take_it():
    sde = RateVP()
    flow = probability_flow(sde, Denoiser(lambda x, t: 0.1 * x, sde, "noise"))
    run = sample(flow, (4, 3), solver="ddim", steps=10, seed=0)
    assert run.fused
    assert encode(flow, run.x, steps=10).x.shape == (4, 3)
    assert _key(DDIM(), flow, log_snr(sde, 5)) is not None  # a value: its tableau is remembered


def test_elementwise_schedules_broadcast():
    speed = torch.tensor([1.0, 2.0, 4.0], dtype=D)
    sde = LinearSDE(lambda t: -speed * t.unsqueeze(-1), lambda t: 1 + t)
    t = torch.tensor([0.2, 0.9], dtype=D)
    assert sde.alpha(t).shape == sde.sigma(t).shape == (2, 3) and sde.alpha(t[0]).shape == (3,)
    torch.testing.assert_close(sde.alpha(t), torch.exp(-speed * t.unsqueeze(-1) ** 2 / 2))
    one = LinearSDE(lambda t: -2.0 * t, lambda t: 1 + t)
    torch.testing.assert_close(sde.sigma(t)[:, 1], one.sigma(t), rtol=1e-14, atol=0)
    x = torch.ones(2, 3, dtype=D)
    assert sde.perturb(x, t, x).shape == sde.drift(x, t).shape == (2, 3)
    flow = probability_flow(sde, GaussianData(sde, torch.zeros(3).double(), speed))
    assert sample(flow, (5, 3), solver="ddim", steps=4, grid="uniform", dtype=D).x.shape == (5, 3)


def test_a_class_of_its_own_is_a_value():
    assert RateVP() == RateVP() != RateVP(beta_max=10.0)
    assert repr(RateVP()) == "RateVP(beta_min=0.1, beta_max=20.0, T=1.0, t_min=0.001)"
    sde = RateVP()
    t = torch.tensor(0.5, dtype=D)
    for other in (copy.copy(sde), copy.deepcopy(sde), pickle.loads(pickle.dumps(sde))):
        assert other == sde and other.sigma(t) == sde.sigma(t)


def test_the_dtype_of_the_time_is_kept():
    assert RateVP().sigma(torch.tensor(0.5)).dtype == torch.float32


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: LinearSDE(g=lambda t: 1.0), ArgumentError, "define a method f"),
        (lambda: LinearSDE(lambda t: 0.0, 3.0), ArgumentError, "g=3.0 must be a function"),
        (lambda: LinearSDE(lambda t: 0.0, lambda t: 1.0, T=-1), ArgumentError, "T=-1"),
        (lambda: LinearSDE(lambda t: torch.ones(5), lambda t: 1.0), ShapeError, "f.t. has shape"),
        (lambda: LinearSDE(lambda t: (0.5 - t).sqrt(), lambda t: 1.0), ArgumentError, "not finite"),
        (lambda: LinearSDE(lambda t: 800.0, lambda t: 1.0), ArgumentError, "must be finite"),
        (
            lambda: LinearSDE(lambda t: torch.frac(1e9 * t * t), lambda t: 1.0),
            ArgumentError,
            "too rough",
        ),
    ],
    ids=label,
)
def test_what_makes_no_schedule_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_the_bundled_closed_forms_are_those_of_their_rates():
    t = torch.tensor([1e-4, 0.4, 0.95], dtype=D)
    for sde in (VP(), VE(), Cosine()):
        again = LinearSDE(
            lambda u, sde=sde: sde.rates(u)[0], lambda u, sde=sde: sde.rates(u)[1].sqrt(), T=sde.T
        )
        torch.testing.assert_close(again.alpha(t), sde.alpha(t), rtol=1e-12, atol=0)
        torch.testing.assert_close(again.sigma(t), sde.sigma(t), rtol=1e-12, atol=0)
