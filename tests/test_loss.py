"""Denoising score matching: each weighting in its own space, each law of times by its quantiles."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ztest import LIMIT, ks_excess, z_of_mean

from sdeflow import (
    EDM,
    VE,
    VP,
    ArgumentError,
    Denoiser,
    GaussianSDE,
    RectifiedFlow,
    ShapeError,
    denoising_loss,
    sample_times,
    score_matching,
)
from sdeflow.denoiser import PREDICTIONS
from sdeflow.loss import TIMES, WEIGHTINGS
from sdeflow.testing import GaussianData

all_predictions = pytest.mark.parametrize("prediction", PREDICTIONS)


def network(x, t):
    return torch.sin(3 * x)


def batch(sde, n=16):
    """Clean data, times and noise of a batch."""
    x0, noise = torch.randn(2, n, 3, 2, dtype=torch.float64)
    t = sde.t_min + (0.99 * sde.T - sde.t_min) * torch.rand(n, dtype=torch.float64)
    return x0, t, noise


def mean_square(error):
    return error.square().flatten(1).mean(1)


def column(values):
    return values[:, None, None]


# ---- weightings


@all_predictions
def test_each_weighting_is_a_squared_error_in_its_own_space(sde, prediction):
    d, (x0, t, noise) = Denoiser(network, sde, prediction), batch(sde)
    x, s = sde.perturb(x0, t, noise), column(sde.sigma(t))
    g = column(sde.rates(t)[1]).sqrt()
    definitions = {
        "data": d.denoise(x, t) - x0,
        "noise": d.noise(x, t) - noise,
        "likelihood": g * (d(x, t) - -noise / s),
        "prediction": d.network(x, t) - d.target(x0, noise, t),
    }
    for weighting, error in definitions.items():
        found = denoising_loss(d, x0, t, noise, weighting)
        torch.testing.assert_close(found, mean_square(error), rtol=1e-6, atol=1e-9)


@given(st.floats(0.01, 80), st.floats(0.1, 3))
def test_the_edm_weighting_is_that_of_karras_and_flat_in_its_own_output(s, sigma_data):
    """lambda = (s^2 + sd^2)/(s sd)^2 = 1/c_out^2. Source: Karras et al. (2022), table 1."""
    d = Denoiser(network, EDM(), "edm", sigma_data)
    x0, noise = torch.randn(2, 4, 3, dtype=torch.float64)
    t = torch.full((4,), s, dtype=torch.float64)
    found = denoising_loss(d, x0, t, noise, "edm")
    published = (s**2 + sigma_data**2) / (s * sigma_data) ** 2
    error = d.denoise(EDM().perturb(x0, t, noise), t) - x0
    torch.testing.assert_close(found, published * mean_square(error), rtol=1e-6, atol=1e-9)
    flat = denoising_loss(d, x0, t, noise, "prediction")
    torch.testing.assert_close(found, flat, rtol=1e-9, atol=0)


def test_min_snr_is_the_noise_weighting_clamped_at_five(sde):
    d, (x0, _, noise) = Denoiser(network, sde, "v"), batch(sde, 64)
    t = sde.time_of_log_snr(torch.linspace(-4, 4, 64))
    snr = torch.exp(sde.log_snr(t))
    expected = torch.where(snr < 5, snr, 5.0) * denoising_loss(d, x0, t, noise, "data")
    torch.testing.assert_close(denoising_loss(d, x0, t, noise, "min_snr"), expected)
    assert (snr < 5).any() and (snr > 5).any()


def test_flow_matching_is_the_prediction_weighting_of_the_velocity():
    d, (x0, t, noise) = Denoiser(network, RectifiedFlow(), "velocity"), batch(RectifiedFlow())
    x = (1 - column(t)) * x0 + column(t) * noise
    expected = mean_square(network(x, t) - (noise - x0))
    torch.testing.assert_close(denoising_loss(d, x0, t, noise, "prediction"), expected)


def test_a_weighting_may_be_a_function_of_denoiser_and_time():
    d, (x0, t, noise) = Denoiser(network, VP()), batch(VP())
    named = denoising_loss(d, x0, t, noise, "data")
    torch.testing.assert_close(denoising_loss(d, x0, t, noise, lambda d, t: 2 * t), 2 * t * named)


class Channels(GaussianSDE):
    """Two channels, forgotten at rates of their own."""

    def __init__(self, rate):
        self.rate = torch.tensor(rate, dtype=torch.float64)

    def alpha(self, t):
        return torch.exp(-t[..., None] * self.rate)

    def sigma(self, t):
        return torch.sqrt(-torch.expm1(-2 * t[..., None] * self.rate))


@pytest.mark.parametrize("weighting", ["data", "noise", "likelihood", "prediction"])
def test_the_loss_of_elementwise_schedules_is_the_mean_over_their_channels(weighting):
    x0, noise = torch.randn(2, 5, 2, dtype=torch.float64)
    t = torch.rand(5, dtype=torch.float64)

    def loss(rate, take):
        d = Denoiser(network, Channels(rate), "v")
        return denoising_loss(d, x0[:, take], t, noise[:, take], weighting)

    both = loss([1.0, 4.0], slice(0, 2))
    each = loss([1.0], slice(0, 1)), loss([4.0], slice(1, 2))
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 2, 2)], ids=str)
def test_the_loss_is_one_number_a_sample_in_float32_at_least(dtype, shape):
    x0 = torch.randn(shape).to(dtype)
    found = denoising_loss(Denoiser(network, VP()), x0, torch.rand(4), torch.randn(shape).to(dtype))
    assert found.shape == (4,) and found.isfinite().all()
    assert found.dtype == torch.promote_types(dtype, torch.float32)


# ---- the exact denoiser is the minimum


@pytest.mark.parametrize("kind", [VP, VE, EDM, RectifiedFlow])
def test_the_loss_of_the_exact_denoiser_is_the_posterior_variance(kind):
    """E |D - x_0|^2 = v s^2/(a^2 v + s^2) on N(m, v): a z-test with a false-alarm rate below
    1e-6. The planted fault, a denoiser 0.05 off, must be rejected."""
    sde, n = kind(), 40_000
    t, mean, v = sde.time_of_log_snr(torch.zeros(n)), 0.7, 0.25
    exact = GaussianData(sde, torch.tensor([mean]).double(), torch.tensor([v]).double())
    x0 = mean + math.sqrt(v) * torch.randn(n, 1, dtype=torch.float64)
    noise = torch.randn(n, 1, dtype=torch.float64)
    a, s = sde.alpha(t[0]), sde.sigma(t[0])
    expected = float(v * s**2 / (a**2 * v + s**2))
    right = denoising_loss(Denoiser(exact.denoise, sde, "data"), x0, t, noise, "data")
    assert abs(z_of_mean(right, expected)) < LIMIT
    off = Denoiser(lambda x, t: exact.denoise(x, t) + 0.05, sde, "data")
    wrong = denoising_loss(off, x0, t, noise, "data")
    assert z_of_mean(wrong - right, 0.0) > LIMIT
    assert abs(z_of_mean(wrong - right, 0.05**2)) < LIMIT


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_no_change_of_the_exact_denoiser_lowers_the_loss(sde, weighting):
    """The loss is convex, and its slope with the gain is zero at the exact denoiser: a z-test over
    the batch, with a false-alarm rate below 1e-6. The planted fault, the slope at a denoiser of
    half the gain, must be rejected."""
    exact = GaussianData(sde, torch.zeros(1).double(), torch.full((1,), 0.25).double())
    x0, noise = torch.randn(2, 20_000, 1, dtype=torch.float64) * torch.tensor([[[0.5]], [[1.0]]])
    t = sample_times(sde, 20_000, lambda sde, u: sde.time_of_log_snr(8 * u - 4))

    def slope_at(gain):
        def loss(c):
            d = Denoiser(lambda x, t: (gain + c) * exact.denoise(x, t), sde, "data")
            return denoising_loss(d, x0, t, noise, weighting)

        return (loss(1e-3) - loss(-1e-3)) / 2e-3  # exact: the loss is quadratic in c

    assert abs(z_of_mean(slope_at(1.0), 0.0)) < LIMIT
    assert z_of_mean(slope_at(0.5), 0.0) < -LIMIT


# ---- laws of times


def uniforms(sde, name, t):
    """What the law of that name makes of its own times: uniform on [0, 1]."""
    if name == "uniform":
        return (t - sde.t_min) / (sde.T - sde.t_min)
    if name == "lognormal":
        return torch.special.ndtr((-sde.log_snr(t) / 2 + 1.2) / 1.2)
    if name == "logit_normal":
        return torch.special.ndtr(torch.logit(t / sde.T))
    ends = sde.log_snr(torch.tensor([sde.t_min, 0.999 * sde.T], dtype=torch.float64))
    return (sde.log_snr(t) - ends[0]) / (ends[1] - ends[0])


def excess(sde, name, t):
    """The KS excess of times over the law named, both given that t lies strictly in (t_min, T):
    what lies beyond is clamped to the ends."""
    ends = torch.tensor([sde.t_min, sde.T], dtype=torch.float64)
    low, high = sorted(uniforms(sde, name, ends).clamp(0, 1).tolist())
    inside = t[(t > sde.t_min) & (t < sde.T)]
    return ks_excess((uniforms(sde, name, inside) - low) / (high - low))


@pytest.mark.parametrize("name", TIMES)
def test_times_have_the_law_named_within_the_range(sde, name):
    """A Kolmogorov-Smirnov test with a false-alarm rate of 1e-6. The planted faults, the times of
    every other law and those of the right one without its upper tenth, are rejected."""
    t = sample_times(sde, 20_000, name, stratified=False)
    assert t.dtype == torch.float64 and t.shape == (20_000,)
    assert ((t >= sde.t_min) & (t <= sde.T)).all()
    assert excess(sde, name, t) < 1
    for other in set(TIMES) - {name}:
        drawn = sample_times(sde, 20_000, other, stratified=False)
        assert excess(sde, name, drawn) > 2
    cut = TIMES[name](sde, 0.9 * torch.rand(20_000, dtype=torch.float64))
    assert excess(sde, name, cut) > 2


@pytest.mark.parametrize("n", [1, 7, 64])
def test_stratified_times_put_one_in_each_cell(n):
    u = uniforms(VP(), "uniform", sample_times(VP(), n))
    assert sorted((u * n).floor().long().tolist()) == list(range(n))


def test_strata_are_shuffled_and_their_law_is_the_same():
    """A KS test over 4000 batches of 5, each cell at each place: false alarms once in 1e6."""
    t = torch.stack([sample_times(VP(), 5) for _ in range(4000)])
    for place in range(5):
        assert ks_excess(uniforms(VP(), "uniform", t[:, place])) < 1


def test_times_may_be_a_function_of_uniforms():
    assert (sample_times(VP(), 5, lambda sde, u: 0 * u + sde.T / 2) == 0.5).all()


# ---- score_matching


def test_a_generator_makes_score_matching_repeatable():
    d, x0 = Denoiser(network, VP()), torch.randn(8, 2)

    def loss(seed):
        return score_matching(d, x0, generator=torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    assert torch.equal(loss(1), loss(1)) and not torch.equal(loss(1), loss(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(score_matching(d, x0), score_matching(d, x0))


@all_predictions
@pytest.mark.parametrize("times", TIMES)
def test_score_matching_is_a_scalar_with_gradients(prediction, times):
    net, x0 = torch.nn.Linear(2, 2), torch.randn(8, 2)
    d = Denoiser(lambda x, t: net(x), VP(), prediction)
    for weighting in WEIGHTINGS:
        net.zero_grad()
        loss = score_matching(d, x0, times=times, weighting=weighting)
        loss.backward()
        assert loss.shape == () and loss.isfinite() and loss > 0
        assert all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters())


def test_score_matching_is_the_mean_over_its_own_times_and_noise():
    d, x0 = Denoiser(network, VP(), "v"), torch.randn(6, 2, dtype=torch.float64)
    found = score_matching(d, x0, times="log_snr", generator=torch.Generator().manual_seed(3))
    g = torch.Generator().manual_seed(3)
    t = sample_times(VP(), 6, "log_snr", generator=g)
    noise = torch.randn(6, 2, dtype=torch.float64, generator=g)
    assert torch.equal(found, denoising_loss(d, x0, t, noise).mean())


# ---- errors


def test_wrong_arguments_are_refused_by_name():
    d, (x0, t, noise) = Denoiser(network, VP()), batch(VP())
    with pytest.raises(ArgumentError, match=r"denoiser must be a Denoiser\(net, sde, prediction"):
        denoising_loss(network, x0, t, noise)
    with pytest.raises(ArgumentError, match=r"t has shape \(\); it must be \(16,\)"):
        denoising_loss(d, x0, t[0], noise)
    with pytest.raises(ShapeError, match=r"noise has shape \(16, 3\); it must be that of x0"):
        denoising_loss(d, x0, t, noise[..., 0])
    with pytest.raises(ArgumentError, match="weighting='nois' is unknown; did you mean 'noise'"):
        denoising_loss(d, x0, t, noise, "nois")
    with pytest.raises(ArgumentError, match="times='lognorml' is unknown; did you mean 'lognormal"):
        score_matching(d, x0, times="lognorml")


@pytest.mark.parametrize("times", ["lognormal", "log_snr"])
def test_log_snr_times_need_one_log_snr(times):
    d = Denoiser(network, Channels([1.0, 4.0]), "v")
    with pytest.raises(ShapeError, match="Channels has elementwise schedules.*'uniform'"):
        score_matching(d, torch.zeros(4, 2), times=times)


@pytest.mark.parametrize("x0", [torch.zeros(4, 2, dtype=torch.uint8), torch.zeros(0, 2)])
def test_the_loss_wants_a_batch_of_numbers(x0):
    with pytest.raises(ShapeError, match="x0"):
        score_matching(Denoiser(lambda x, t: x, VP()), x0)


@pytest.mark.parametrize("n", [0, -1, 2.5, True])
def test_times_are_drawn_for_a_whole_number_of_samples(n):
    with pytest.raises(ArgumentError, match="n="):
        sample_times(VP(), n)
