"""The one table of parametrisations: every row means the same D = E[x_0 | x_t]."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdeflow import EDM, GBM, VP, ArgumentError, Denoiser, GaussianSDE, RectifiedFlow, ShapeError
from sdeflow.denoiser import ALIASES, PREDICTIONS, checked_output

fractions = st.floats(0.002, 0.999)
predictions = pytest.mark.parametrize("prediction", PREDICTIONS)


def silent(x, t):
    return torch.zeros_like(x)


class Recorder:
    """A network that remembers what it saw."""

    def __call__(self, x, t):
        self.x, self.t = x, t
        return torch.sin(x)


class Channels(GaussianSDE):
    """Two channels, forgotten at rates of their own."""

    rate = torch.tensor([1.0, 3.0], dtype=torch.float64)

    def alpha(self, t):
        return torch.exp(-t[..., None] * self.rate)

    def sigma(self, t):
        return torch.sqrt(-torch.expm1(-2 * t[..., None] * self.rate))


# ---- all rows are one denoiser


@predictions
@given(fraction=fractions, sigma_data=st.floats(0.1, 3))
def test_the_target_as_output_recovers_the_data(sde, prediction, fraction, sigma_data):
    """D = x_0, noise = eps and score = -eps/sigma where the network returns F*."""
    t = torch.tensor(fraction * sde.T, dtype=torch.float64)
    x0, eps = torch.randn(2, 3, 4, dtype=torch.float64)
    plain = Denoiser(silent, sde, prediction, sigma_data)
    target = plain.target(x0, eps, t)
    denoiser = Denoiser(lambda x, t: target, sde, prediction, sigma_data)
    x, s = sde.perturb(x0, t, eps), sde.sigma(t)
    tolerance = 1e-9 * float(1 + s / sde.alpha(t))
    torch.testing.assert_close(denoiser.denoise(x, t), x0, rtol=0, atol=tolerance)
    noise = 1e-9 * float(1 + sde.alpha(t) / s)
    torch.testing.assert_close(denoiser.noise(x, t), eps, rtol=0, atol=noise)
    torch.testing.assert_close(s * denoiser(x, t), -eps, rtol=0, atol=noise)


@predictions
def test_a_time_for_each_sample_is_each_sample_at_its_time(sde, prediction):
    denoiser = Denoiser(lambda x, t: torch.sin(x + t[:, None]), sde, prediction)
    x = torch.randn(4, 2, dtype=torch.float64)
    t = torch.tensor([0.1, 0.3, 0.5, 0.9], dtype=torch.float64) * sde.T
    for function in (denoiser.denoise, denoiser.noise, denoiser, denoiser.network):
        alone = torch.cat([function(x[i : i + 1], t[i]) for i in range(4)])
        torch.testing.assert_close(function(x, t), alone, rtol=1e-11, atol=1e-11)


@given(fractions, st.floats(0.1, 3))
def test_the_edm_row_is_table_1_of_karras(fraction, sigma_data):
    """c_skip = sd^2/(s^2 + sd^2), c_out = s sd/sqrt(s^2 + sd^2), c_in = 1/sqrt(s^2 + sd^2),
    c_noise = ln(s)/4, for s = t and sd = sigma_data."""
    s, net = 80 * fraction, Recorder()
    denoiser = Denoiser(net, EDM(), "edm", sigma_data)
    total, x = s**2 + sigma_data**2, torch.randn(3, 2, dtype=torch.float64)
    found = denoiser.denoise(x, s)
    expected = sigma_data**2 / total * x
    expected = expected + s * sigma_data / math.sqrt(total) * torch.sin(x / math.sqrt(total))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(net.x, x / math.sqrt(total), rtol=1e-12, atol=0)
    assert net.t.tolist() == pytest.approx([math.log(s) / 4] * 3, abs=1e-12)


@given(fractions, st.floats(0.1, 3))
def test_edm_networks_see_and_return_unit_variance_under_every_sde(sde, fraction, sigma_data):
    """Data of variance sigma_data^2 make Var[c_in x_t] = Var[F*] = 1."""
    t = torch.tensor(fraction * sde.T, dtype=torch.float64)
    row = Denoiser(silent, sde, "edm", sigma_data).row(t)
    variance = sde.alpha(t) ** 2 * sigma_data**2 + sde.sigma(t) ** 2
    assert float(row.c_in**2 * variance) == pytest.approx(1, rel=1e-9)
    assert float(row.p**2 * sigma_data**2 + row.q**2) == pytest.approx(1, rel=1e-9)


@given(fractions)
def test_v_of_vp_is_the_rotated_pair(fraction):
    """x_t = a x_0 + s eps, v = a eps - s x_0: a rotation, so that D = a x - s v."""
    sde, t = VP(), torch.tensor(fraction, dtype=torch.float64)
    x, v = torch.randn(2, 3, 2, dtype=torch.float64)
    found = Denoiser(lambda x, t: v, sde, "v").denoise(x, t)
    torch.testing.assert_close(found, sde.alpha(t) * x - sde.sigma(t) * v, rtol=1e-9, atol=1e-9)


@given(fractions)
def test_velocity_of_rectified_flow_is_noise_minus_data(fraction):
    sde, t = RectifiedFlow(), torch.tensor(fraction, dtype=torch.float64)
    x, v = torch.randn(2, 3, 2, dtype=torch.float64)
    denoiser = Denoiser(lambda x, t: v, sde, "flow")
    torch.testing.assert_close(denoiser.target(x, v, t), v - x)
    torch.testing.assert_close(denoiser.denoise(x, t), x - t * v)


@pytest.mark.parametrize("alias", ALIASES)
def test_the_aliases_of_the_field_are_the_same_value(alias):
    assert Denoiser(silent, VP(), alias) == Denoiser(silent, VP(), ALIASES[alias])
    assert ALIASES[alias] in PREDICTIONS and alias not in PREDICTIONS


# ---- what the network sees


@predictions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_network_sees_its_batch_of_times_in_the_dtype_of_the_state(sde, prediction, dtype):
    net = Recorder()
    denoiser = Denoiser(net, sde, prediction)
    x = torch.randn(3, 2, 2, dtype=dtype)
    expected = sde.log_snr(torch.tensor(0.5).double()) / -8 if prediction == "edm" else 0.5
    for t in (0.5, torch.tensor(0.5).double(), torch.full((3,), 0.5, dtype=torch.float64)):
        made = denoiser.denoise(x, t)
        assert net.t.shape == (3,) and net.t.dtype == dtype == net.x.dtype == made.dtype
        torch.testing.assert_close(net.t, torch.full((3,), float(expected)).to(dtype))
        if prediction != "edm":
            assert net.x is x


@predictions
@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 4, 5)], ids=str)
def test_states_of_any_rank_pass(prediction, shape):
    x = torch.randn(shape, dtype=torch.float64)
    denoiser = Denoiser(Recorder(), VP(), prediction)
    for t in (0.5, torch.full((3,), 0.5, dtype=torch.float64)):
        assert denoiser.denoise(x, t).shape == denoiser(x, t).shape == x.shape


@predictions
@pytest.mark.parametrize("batched", [True, False], ids=["times", "time"])
def test_schedules_of_their_own_make_channels_separate_or_are_refused(prediction, batched):
    t = (
        torch.linspace(0.2, 0.8, 2, dtype=torch.float64)
        if batched
        else torch.tensor(0.4, dtype=torch.float64)
    )
    x0, eps = torch.randn(2, 2, 2, dtype=torch.float64)
    sde, plain = Channels(), Denoiser(silent, Channels(), prediction)
    if prediction == "edm":
        with pytest.raises(ShapeError, match="prediction='edm'.*Channels has elementwise.*use 'v'"):
            plain.denoise(x0, t)
        return
    target = plain.target(x0, eps, t)
    denoiser = Denoiser(lambda x, t: target, sde, prediction)
    torch.testing.assert_close(denoiser.denoise(sde.perturb(x0, t, eps), t), x0)


@predictions
def test_without_noise_the_state_is_the_data(sde, prediction):
    x, zero = torch.randn(3, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    denoiser = Denoiser(lambda x, t: torch.sin(x + t[:, None]), sde, prediction)
    for t in (zero, zero[0], 0.0):
        torch.testing.assert_close(denoiser.denoise(x, t), x)


# ---- errors


@pytest.mark.parametrize("output", [None, 1.0, (torch.zeros(2, 3),), {"sample": 0}], ids=repr)
def test_a_network_must_return_a_tensor(output):
    denoiser = Denoiser(lambda x, t: output, VP())
    with pytest.raises(ShapeError, match=r"net\(x, t\) returned \w+; .*model\(x, t\).sample"):
        denoiser.denoise(torch.zeros(2, 3), 0.5)


def test_a_network_must_return_the_shape_of_the_state():
    denoiser = Denoiser(lambda x, t: torch.cat((x, x), 1), VP())
    with pytest.raises(ShapeError, match=r"shape \(2, 6\) for x of shape \(2, 3\).*first half"):
        denoiser.denoise(torch.zeros(2, 3), 0.5)
    kept = torch.zeros(2, 3)
    assert checked_output("net", kept, kept) is kept


def test_unknown_predictions_are_refused_with_the_close_match():
    with pytest.raises(ArgumentError, match="prediction='velocty' is unknown; did you mean 'velo"):
        Denoiser(silent, VP(), "velocty")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((3, VP()), r"net=3 must be callable as net\(x, t\)"),
        ((silent, GBM()), r"sde=GBM\(.* must be a GaussianSDE"),
        ((silent, VP), "sde=.* must be a GaussianSDE"),
        ((silent, VP(), "edm", 0.0), "sigma_data=0.0 must be > 0"),
        ((silent, VP(), "edm", math.nan), "sigma_data=nan must be > 0"),
    ],
    ids=["net", "gbm", "class", "zero", "nan"],
)
def test_wrong_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        Denoiser(*arguments)


def test_wrong_batches_of_times_are_refused():
    with pytest.raises(ShapeError, match=r"t has shape \(3,\); it must be \(\) or \(2,\)"):
        Denoiser(silent, VP()).denoise(torch.zeros(2, 4), torch.full((3,), 0.5))
