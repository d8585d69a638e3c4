"""Power averages and post-hoc EMA, against averages of a known trajectory of weights."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from sdeflow_plugins.train import checkpoint
from sdeflow_plugins.train.average import exponent, power_decay
from sdeflow_plugins.train.engine import make_fabric
from sdeflow_plugins.train.loop import training
from sdeflow_plugins.train.posthoc import combination, reconstruct, take_snapshot
from sdeflow_plugins.train.recipe import Recipe
from sdeflow_plugins.train.state import State

from sdeflow import ArgumentError

N = 600
SMALL = Recipe(
    data="moons",
    data_options={"n": 64},
    network="mlp",
    network_options={"width": 8, "depth": 1},
    steps=60,
    batch_size=8,
    warmup=2,
    device="cpu",
    posthoc_every=5,
)


def trajectory():
    """A random walk on a slow wave: (N,)."""
    steps = np.random.default_rng(0).normal(size=N)
    return 0.03 * np.cumsum(steps) + np.sin(np.arange(N) / 80)


def average(values, width):
    """The power average of all values, step by step as the training makes it."""
    mean = 0.0
    for n, value in enumerate(values):
        d = power_decay(width, n)
        mean = d * mean + (1 - d) * value
    return mean


@pytest.mark.parametrize("width", [0.02, 0.05, 0.1, 0.2, 0.28])
def test_the_width_of_a_power_average_is_its_standard_deviation(width):
    shares = np.array([average(np.eye(N)[k], width) for k in range(0, N, 1)])
    time = np.arange(1, N + 1) / N
    mean = shares @ time
    assert shares.sum() == pytest.approx(1)
    assert np.sqrt(shares @ (time - mean) ** 2) == pytest.approx(width, rel=2e-3)
    g = exponent(width) + 1
    np.testing.assert_allclose(shares, time**g - (time - 1 / N) ** g, atol=1e-12)


def test_the_exponents_of_the_paper():
    """Karras et al. (2024, EDM2), section 3: widths 0.05 and 0.10 are gamma 16.97 and 6.94."""
    assert [exponent(0.05), exponent(0.10)] == pytest.approx([16.97, 6.94], abs=5e-3)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.29, float("nan")])
def test_a_width_that_no_profile_has_is_refused(width):
    with pytest.raises(ArgumentError, match="width=.*must be in"):
        exponent(width)


@pytest.mark.parametrize("width", [0.03, 0.07, 0.15, 0.2])
def test_more_snapshots_come_closer_to_the_average_asked_for(width):
    theta, gaps, distances = trajectory(), [], []
    direct = average(theta, width)
    for every in (100, 25, 5):
        pairs = list(itertools.product(range(every, N + 1, every), (0.05, 0.1)))
        known = np.array([average(theta[:s], w) for s, w in pairs])
        shares, distance = combination([s for s, _ in pairs], [w for _, w in pairs], N, width)
        assert shares.sum() == pytest.approx(1, abs=1e-9)
        gaps.append(abs(shares @ known - direct))
        distances.append(distance)
    assert distances[0] > distances[1] > distances[2] and distances[2] < 3e-3
    assert gaps[2] < 2e-4 * np.ptp(theta)


def test_a_tracked_profile_is_its_own_combination():
    pairs = list(itertools.product(range(50, N + 1, 50), (0.05, 0.1)))
    shares, distance = combination([s for s, _ in pairs], [w for _, w in pairs], 400, 0.1)
    expected = [float(pair == (400, 0.1)) for pair in pairs]
    np.testing.assert_allclose(shares, expected, atol=1e-6)
    assert distance < 1e-6


# ---- in a run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(snapshots, the weights after each step, the state at the end)."""
    folder = tmp_path_factory.mktemp("run") / "posthoc"
    dataset, fabric = SMALL.make_dataset(), make_fabric(SMALL)
    state = State.fresh(SMALL, dataset.shape, fabric.device)
    weights = []
    for record in training(SMALL, dataset, state, fabric):
        weights.append({n: t.clone() for n, t in state.network.state_dict().items()})
        if record.step % SMALL.posthoc_every == 0:
            take_snapshot(folder, state)
    return folder, weights, state


def test_any_width_is_made_after_the_training(run):
    """Planted fault: the average of another width is farther off by a factor of 20."""
    folder, weights, _ = run
    found = reconstruct(folder, 0.15)
    assert found.step == 60 and 0 < found.distance < 0.05

    def gap(width):
        return max(
            float((found.tensors[n] - average([w[n] for w in weights], width)).abs().max())
            for n in weights[0]
        )

    assert found.tensors.keys() == weights[0].keys()
    assert 20 * gap(0.15) < gap(0.2)


@pytest.mark.parametrize("width", SMALL.posthoc_widths)
def test_a_tracked_width_comes_back_bit_for_bit(run, width):
    folder, _, state = run
    found = reconstruct(folder, width)
    tracked = state.posthoc[width].module.state_dict()
    assert found.distance == 0 and found.tensors.keys() == tracked.keys()
    assert all(torch.equal(found.tensors[n], tracked[n]) for n in tracked)


def test_an_average_may_end_at_an_earlier_snapshot_and_knows_nothing_later(run):
    folder, weights, _ = run
    found = reconstruct(folder, 0.15, step=30)
    n = next(iter(weights[0]))
    direct = average([w[n] for w in weights[:30]], 0.15)
    assert found.step == 30 and float((found.tensors[n] - direct).abs().max()) < 1e-4


def test_a_network_takes_what_was_reconstructed(run):
    network = SMALL.make_network((2,))
    network.load_state_dict(reconstruct(run[0], 0.2).tensors)


def test_what_cannot_be_reconstructed_is_told(run, tmp_path):
    with pytest.raises(ArgumentError, match="holds no snapshots; train with posthoc_every"):
        reconstruct(tmp_path, 0.1)
    with pytest.raises(ArgumentError, match="step=31 has no snapshot.*30, 35"):
        reconstruct(run[0], 0.1, step=31)
    with pytest.raises(ArgumentError, match="width=0.01.*come no closer than 0.*posthoc_every"):
        reconstruct(run[0], 0.01)
    with pytest.raises(ArgumentError, match="width=0.5 of a power average"):
        reconstruct(run[0], 0.5)


def test_a_damaged_snapshot_is_found(run, tmp_path):
    for file in run[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    last = tmp_path / "step_00000060.safetensors"
    last.write_bytes(last.read_bytes()[:-1] + b"?")
    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
        reconstruct(tmp_path, 0.15)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ema_width": 0.4}, r"ema_width=0.4 must be in \(0, 0.28\]"),
        ({"posthoc_widths": [0.0]}, "posthoc_widths=0.0"),
        ({"posthoc_widths": []}, r"posthoc_widths=\[\]"),
        ({"posthoc_widths": [0.1, 0.1]}, "must be distinct"),
        ({"posthoc_every": -1}, "posthoc_every=-1"),
        ({"ema_kind": "powers"}, "did you mean 'power'"),
    ],
    ids=str,
)
def test_a_recipe_refuses_averages_that_are_none(options, words):
    with pytest.raises(ArgumentError, match=words):
        dataclasses.replace(SMALL, **options)


def test_a_recipe_with_widths_survives_its_file(tmp_path):
    recipe = dataclasses.replace(SMALL, posthoc_widths=(0.07, 0.2))
    recipe.save(tmp_path / "config.yaml")
    assert Recipe.load(tmp_path / "config.yaml") == recipe
