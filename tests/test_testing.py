"""The conformance kit itself: its problems are exact, its laws are those of samples."""

import math

import pytest
import torch
from sdeflow_plugins.solvers.ddim import DDIM
from sdeflow_plugins.solvers.ddpm import DDPM
from sdeflow_plugins.solvers.dpmpp import DPMpp2M, DPMpp2S
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from ztest import LIMIT, z_of_mean, z_of_variance

from sdeflow import VP, ArgumentError, EulerMaruyama, Heun, ReverseSDE, TorchSDE, sample
from sdeflow.grid import karras, log_snr
from sdeflow.testing import (
    GaussianData,
    MixtureData,
    order,
    output_law,
    strong_errors,
    weak_errors,
)

DOUBLE = {"dtype": torch.float64}
MEAN, VARIANCE = torch.tensor([1.0, -0.5], **DOUBLE), torch.tensor([0.09, 2.0], **DOUBLE)


def score_by_autograd(density, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(density.log_prob(x).sum(), x)[0]


# ---- problems


@pytest.mark.parametrize("t", [0.02, 0.3, 0.9])
def test_the_score_of_gaussian_data_is_the_gradient_of_its_density(sde, t):
    time = torch.tensor(t * sde.T, **DOUBLE)
    data, x = GaussianData(sde, MEAN, VARIANCE), 2 * torch.randn(50, 2, **DOUBLE)
    mean, variance = data.law(time)
    exact = score_by_autograd(Independent(Normal(mean, variance.sqrt()), 1), x)
    torch.testing.assert_close(data(x, time), exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("t", [0.02, 0.3, 0.9])
def test_the_score_of_mixture_data_is_the_gradient_of_its_density(sde, t):
    time = torch.tensor(t * sde.T, **DOUBLE)
    data, x = MixtureData.five(sde), 2 * torch.randn(50, 2, **DOUBLE)
    a, s = sde.alpha(time), sde.sigma(time)
    std = (a**2 * data.variance + s**2).sqrt()
    density = MixtureSameFamily(
        Categorical(data.weights), Independent(Normal(a * data.means, std.expand(5, 2)), 1)
    )
    exact = score_by_autograd(density, x)
    torch.testing.assert_close(data(x, time), exact, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("make", [lambda s: GaussianData(s, MEAN, VARIANCE), MixtureData.five])
def test_denoiser_and_score_obey_tweedie(sde, make):
    data, x = make(sde), 2 * torch.randn(50, 2, **DOUBLE)
    for t in (0.02, 0.9):
        time = torch.tensor(t * sde.T, **DOUBLE)
        a, s = sde.alpha(time), sde.sigma(time)
        tweedie = (x + s**2 * data(x, time)) / a
        torch.testing.assert_close(data.denoise(x, time), tweedie, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [lambda s: GaussianData(s, MEAN, VARIANCE), MixtureData.five])
def test_problems_take_a_time_for_each_sample(sde, make):
    data, x = make(sde), torch.randn(3, 2, **DOUBLE)
    times = torch.tensor([0.1, 0.5, 0.9], **DOUBLE) * sde.T
    for answer in (data, data.denoise):
        rows = torch.cat([answer(x[i : i + 1], times[i]) for i in range(3)])
        torch.testing.assert_close(answer(x, times), rows, rtol=1e-12, atol=1e-12)


# ---- the exact law of an output

SOLVERS = (DDIM(), DPMpp2M(), DPMpp2S(), EulerMaruyama(), Heun(), TorchSDE("srk"))


def zs(solver, eta, law):
    """The z of mean and variance of 20,000 samples against a law; each |z| < 5, a false alarm once
    in 1.7 million."""
    process = ReverseSDE(VP(), GaussianData(VP(), MEAN, VARIANCE), eta)
    ts = log_snr(VP(), 6, t_min=0.05)
    x_T = GaussianData(VP(), 0 * MEAN, 0 * VARIANCE).law(ts[0])
    mean, variance = law(process, ts, solver, *x_T)
    x = sample(process, (20_000, 2), solver=solver, grid=ts, seed=3, **DOUBLE).x
    return [
        test(x[:, k], float(exact[k]))
        for test, exact in ((z_of_mean, mean), (z_of_variance, variance))
        for k in range(2)
    ]


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_the_output_law_is_that_of_samples(solver, eta):
    """Six coarse steps, so that the law is the solver's own and far from the target."""
    if eta or not isinstance(solver, TorchSDE):
        assert max(map(abs, zs(solver, eta, output_law))) < LIMIT


@pytest.mark.parametrize(
    "wrong",
    [
        lambda p, ts, solver, *law: p.score.law(ts[-1]),
        lambda p, ts, solver, *law: output_law(p, ts, DPMpp2M(), *law),
        lambda p, ts, solver, mean, v: output_law(p, ts, solver, mean, 1.1 * v),
        lambda p, ts, solver, mean, v: output_law(p, ts, solver, mean + 0.1, v),
    ],
    ids=["the target", "another solver", "another variance", "another mean"],
)
def test_samples_reject_a_wrong_law(wrong):
    """The planted faults: six steps of DDIM are far from each of these."""
    assert max(map(abs, zs(DDIM(), 0.0, wrong))) > LIMIT


@pytest.mark.parametrize("solver", [DPMpp2M(), DDPM("large")], ids=repr)
def test_components_do_not_mix(solver):
    """The law of two components is the two laws of one."""

    def law(mean, variance):
        process = ReverseSDE(VP(), GaussianData(VP(), mean, variance))
        return torch.stack(output_law(process, karras(VP(), 7), solver, mean, variance))

    both = law(MEAN, VARIANCE)
    for k in (0, 1):
        alone = law(MEAN[[k]], VARIANCE[[k]])
        torch.testing.assert_close(both[:, [k]], alone, rtol=1e-12, atol=0)


def test_a_run_that_is_not_affine_has_no_law():
    class Clamped(DDIM):
        def step(self, process, x, t, s, noise, memory):
            x, memory = super().step(process, x, t, s, noise, memory)
            return x.clamp(-1, 1), memory

    process = ReverseSDE(VP(), GaussianData(VP(), MEAN, VARIANCE))
    with pytest.raises(ArgumentError, match="is not affine on this problem"):
        output_law(process, log_snr(VP(), 6), Clamped(), MEAN, VARIANCE)


# ---- errors and orders


def test_the_order_is_the_slope_of_the_last_two_errors():
    steps = [5, 10, 30]
    assert order([9.0, 3 * 10**-2.0, 3 * 30**-2.0], steps) == pytest.approx(2)
    assert order([9.0, -3 * 10**-1.0, 3 * 30**-1.0], steps) == pytest.approx(1)


@pytest.mark.parametrize(("errors", "steps"), [([1.0], [10]), ([1.0, 0.5], [10]), ([], [])])
def test_an_order_needs_two_errors_and_their_steps(errors, steps):
    with pytest.raises(ArgumentError, match="must match, at least two"):
        order(errors, steps)


def test_the_weak_error_of_one_point_data_is_zero():
    """DDIM keeps them exactly; Euler-Maruyama does not."""
    exact, rough = (
        weak_errors(solver, VP(), 1.0, [10], variance=0.0)[0]
        for solver in (DDIM(), EulerMaruyama())
    )
    assert abs(exact) < 1e-12 < abs(rough)


def test_the_weak_error_of_ddim_is_the_product_of_cosines():
    ts = log_snr(VP(), 10)
    theta = torch.atan(torch.exp(-VP().log_snr(ts) / 2) / math.sqrt(0.4))
    expected = float(theta.diff().cos().prod() ** 2 - 1)
    assert weak_errors(DDIM(), VP(), 0.0, [10])[0] == pytest.approx(expected, rel=1e-10)


def test_strong_errors_are_against_a_reference_that_is_fine_enough():
    """Two methods of high order agree with it to far below what is measured."""
    errors = strong_errors("torchdiffeq_rk4", VP(), [640], lambda s, n: log_snr(s, n, t_min=0.02))
    assert errors[0] < 1e-9
