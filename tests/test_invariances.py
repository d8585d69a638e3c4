"""What must not change a sample: the network's prediction, the batch, the road, a vanishing eta."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import cases, numbers
from sdeflow_plugins.solvers.ddim import DDIM
from sdeflow_plugins.solvers.dpmpp import DPMpp1S, DPMpp2M, DPMpp2S

from sdeflow import (
    VP,
    Denoiser,
    EulerMaruyama,
    Heun,
    ReverseSDE,
    TorchDiffEq,
    TorchSDE,
    integrate,
    sample,
)
from sdeflow.denoiser import PREDICTIONS
from sdeflow.testing import GaussianData

DOUBLE = {"dtype": torch.float64}
ANY_ETA = (EulerMaruyama(), Heun(), DDIM(), DPMpp1S(), DPMpp2S(), DPMpp2M())


@pytest.mark.parametrize("solver", ANY_ETA, ids=repr)
@settings(max_examples=10)
@given(case=cases(etas=st.just(1e-7)))
def test_eta_to_zero_is_the_probability_flow(solver, case):
    sde, ts, mean, variance, eta = case
    process = ReverseSDE(sde, GaussianData(sde, mean, variance), eta)
    ode = dataclasses.replace(process, eta=0.0)
    near, limit = (
        sample(p, (4, 3), solver=solver, grid=ts, seed=1, dtype=torch.float64).x
        for p in (process, ode)
    )
    torch.testing.assert_close(near, limit, rtol=1e-4, atol=1e-4)
    assert not torch.equal(near, limit)


# ---- one underlying function, many networks


def denoise(x, t):
    """Some nonlinear D, of x and t."""
    t = t.reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(1.3 * x + 0.4) / (1 + t)


def network(sde, prediction, sigma_data):
    """What a network of that prediction says where D is `denoise`; written from the papers."""

    def net(x, t):
        if prediction == "edm":
            t = sde.time_of_log_snr(-8 * t)
        a, s = (v.reshape(-1, *[1] * (x.ndim - 1)) for v in (sde.alpha(t), sde.sigma(t)))
        if prediction == "edm":
            level = s / a
            root = torch.sqrt(level**2 + sigma_data**2)
            x_hat = x * root
            skip, out = sigma_data**2 / root**2, level * sigma_data / root
            return (denoise(a * x_hat, t) - skip * x_hat) / out
        data = denoise(x, t)
        eps = (x - a * data) / s
        da, ds = (v.reshape(-1, *[1] * (x.ndim - 1)) for v in sde.slopes(t))
        return {
            "data": data,
            "noise": eps,
            "score": -eps / s,
            "v": a * eps - s * data,
            "velocity": da * data + ds * eps,
        }[prediction]

    return net


@pytest.mark.parametrize("solver", (*ANY_ETA, TorchDiffEq("rk4"), TorchSDE("srk")), ids=repr)
@settings(max_examples=6)
@given(case=cases(steps=(2, 12), etas=numbers(0.1, 1)))
def test_all_predictions_give_one_trajectory(solver, case):
    sde, ts, _, _, eta = case
    eta = 0.0 if isinstance(solver, TorchDiffEq) else eta
    x = sde.prior(torch.randn(3, 2, dtype=torch.float64), ts[0])
    runs = {}
    for prediction in PREDICTIONS:
        denoiser = Denoiser(network(sde, prediction, 0.7), sde, prediction, sigma_data=0.7)
        for grad in (False, True):
            process = ReverseSDE(sde, denoiser, eta)
            run = integrate(process, x, ts, solver, seed=1, grad=grad, keep=True)
            runs[prediction, grad] = run.path
    reference = runs["data", True]
    for path in runs.values():
        torch.testing.assert_close(path, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("solver", (*ANY_ETA, TorchDiffEq("rk4"), TorchSDE("srk")), ids=repr)
@settings(max_examples=10)
@given(case=cases(steps=(2, 12), etas=numbers(0.1, 1)))
def test_a_score_is_its_denoiser(solver, case):
    """Two ways to the drift: by way of f - (1 + eta^2)/2 g^2 s, and from D."""
    sde, ts, mean, variance, eta = case
    data = GaussianData(sde, mean, variance)
    eta = 0.0 if isinstance(solver, TorchDiffEq) else eta
    by_score, by_denoiser = (
        sample(ReverseSDE(sde, score, eta), (4, 3), solver=solver, grid=ts, seed=1, **DOUBLE).x
        for score in (lambda x, t: data(x, t), data)
    )
    torch.testing.assert_close(by_score, by_denoiser, rtol=1e-9, atol=1e-9)


# ---- batches


@pytest.mark.parametrize("solver", (*ANY_ETA, TorchSDE("srk")), ids=repr)
@settings(max_examples=5)
@given(
    seed=st.integers(0, 2**63 - 1),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    shape=st.sampled_from(((), (5,), (3, 4, 4))),
)
def test_a_sample_does_not_depend_on_its_batch(solver, seed, dtype, shape):
    """The first 8 of 64 are the batch of 8, bit for bit."""
    process = ReverseSDE(VP(), lambda x, t: -x * torch.exp(-t))
    many, few = (
        sample(process, (n, *shape), solver=solver, steps=6, seed=seed, dtype=dtype).x
        for n in (64, 8)
    )
    assert torch.equal(many[:8], few)
    assert not torch.equal(many[8:16], few)


@pytest.mark.parametrize("solver", (*ANY_ETA, TorchSDE("srk")), ids=repr)
@settings(max_examples=5)
@given(seeds=st.permutations(range(100, 106)))
def test_samples_follow_their_seeds_through_any_order(solver, seeds):
    process = ReverseSDE(VP(), lambda x, t: -x * torch.exp(-t))
    ordered, mixed = (
        sample(process, (6, 5), solver=solver, steps=6, seed=order).x
        for order in (range(100, 106), seeds)
    )
    assert torch.equal(mixed, ordered[[seed - 100 for seed in seeds]])
