"""Each metric against its closed form or a library, its error bar, and feature networks by name."""

import math

import numpy as np
import ot
import pytest
import scipy.linalg
import torch
from safetensors.torch import save_file
from sdeflow_plugins.evaluate.bootstrap import difference, draws, estimate, mean_of
from sdeflow_plugins.evaluate.distances import (
    frechet,
    frechet_distance,
    gaussian_like,
    kernel,
    kernel_distance,
    sliced,
    sliced_wasserstein,
    unit_vectors,
)
from sdeflow_plugins.evaluate.features import fingerprint, load_features
from sdeflow_plugins.evaluate.manifolds import manifolds, neighbour_radii
from sdeflow_plugins.evaluate.memorisation import nearer, nearest
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from ztest import LIMIT, z_of_mean

from sdeflow import ArgumentError, ShapeError


def normals(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- Frechet


def test_frechet_distance_of_gaussians_has_its_closed_form():
    z = normals(50_000, 2)
    z = (z - z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T)).mT)
    scale = torch.tensor([2.0, 3.0], dtype=torch.float64)
    assert frechet_distance(z, z) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(z, scale * z + 1) == pytest.approx(2 + 1 + 4)
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    # Covariances that do not commute: tr(A + B - 2 (A B)^(1/2)) by another road.
    a, b = z * scale, z * scale @ turn.T
    root = scipy.linalg.sqrtm((torch.cov(a.T) @ torch.cov(b.T)).numpy()).real
    assert frechet_distance(a, b) == pytest.approx(2 * 13 - 2 * np.trace(root))
    with pytest.raises(ShapeError, match="N > 1"):
        frechet_distance(z[:1], z)
    with pytest.raises(ShapeError, match="columns"):
        frechet_distance(z, normals(10, 3))


class Same(nn.Module):
    num_features = 12

    def forward(self, x):
        return x


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save")
def test_frechet_and_kernel_distance_are_those_of_torchmetrics():
    a, b = normals(300, 12) @ normals(12, 12, seed=1), 0.5 + normals(300, 12, seed=2)
    fid, kid = FrechetInceptionDistance(Same()), KernelInceptionDistance(Same(), 1, 300)
    for metric in (fid.set_dtype(torch.float64), kid.set_dtype(torch.float64)):
        metric.update(b, real=True)
        metric.update(a, real=False)
    assert frechet_distance(a, b) == pytest.approx(float(fid.compute()), rel=1e-9)
    assert kernel_distance(a, b) == pytest.approx(float(kid.compute()[0]), rel=1e-9)


# ---- the kernel distance


def with_equal_pairs(a, b):
    """The biased estimate of the squared mean discrepancy."""
    k = [((x @ y.T + 1) ** 3).mean() for x, y in ((a, a), (b, b), (a, b))]
    return float(k[0] + k[1] - 2 * k[2])


def moment_kernel(m1, m2):
    """E (x y + 1)^3 of independent x ~ N(m1, 1), y ~ N(m2, 1)."""
    second = (1 + m1**2) * (1 + m2**2)
    third = (m1**3 + 3 * m1) * (m2**3 + 3 * m2)
    return 1 + 3 * m1 * m2 + 3 * second + third


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_the_kernel_distance_is_unbiased(shift):
    """Its mean over 400 pairs of sets is the exact one, 0 for equal laws; false alarms: 6e-7."""
    exact = moment_kernel(0, 0) + moment_kernel(shift, shift) - 2 * moment_kernel(0, shift)
    assert (exact == 0) == (shift == 0)
    pairs = [(normals(20, 1, seed=2 * k), normals(25, 1, seed=2 * k + 1)) for k in range(400)]
    found = torch.tensor([kernel_distance(a, b + shift) for a, b in pairs])
    assert abs(z_of_mean(found, exact)) < LIMIT
    # The estimate with the pairs (i, i), which is biased, is rejected.
    biased = torch.tensor([with_equal_pairs(a, b + shift) for a, b in pairs])
    assert abs(z_of_mean(biased, exact)) > LIMIT


def test_blocks_average_the_kernel_distance_over_disjoint_parts():
    a, b = normals(600, 3), normals(900, 3, seed=1) + 0.3
    whole, parts = kernel_distance(a, b), kernel_distance(a, b, block=150)
    assert parts != whole and parts == pytest.approx(whole, rel=0.3)
    assert kernel_distance(a, b, block=10_000) == whole


# ---- sliced Wasserstein


def test_sliced_wasserstein_distance_of_a_shift_is_exact():
    x, shift = normals(501, 5), torch.arange(5.0, dtype=torch.float64)
    axes = unit_vectors(5, 128)
    assert sliced_wasserstein(x, x) < 1e-6
    expected = (shift @ axes).square().mean().sqrt()
    assert sliced_wasserstein(x, x + shift) == pytest.approx(float(expected))


@pytest.mark.parametrize("sizes", [(200, 200), (200, 70), (33, 100)])
def test_sliced_wasserstein_distance_is_that_of_pot(sizes):
    a, b = normals(sizes[0], 4), 2 * normals(sizes[1], 4, seed=1) + 1
    projections = unit_vectors(4, 128).numpy()
    expected = ot.sliced_wasserstein_distance(a.numpy(), b.numpy(), projections=projections)
    assert sliced_wasserstein(a, b) == pytest.approx(float(expected))


def test_a_gaussian_fit_has_the_mean_and_covariance_of_the_data():
    x = torch.tensor([[1.0, 0.0], [3.0, 1.0], [2.0, 5.0]])
    fit = gaussian_like(x, 200_000)
    torch.testing.assert_close(fit.mean(0), x.mean(0), atol=0.03, rtol=0)
    torch.testing.assert_close(torch.cov(fit.T), torch.cov(x.T), atol=0.1, rtol=0)


# ---- precision and recall, density and coverage


def test_equal_sets_have_precision_and_recall_one_and_distant_ones_zero():
    x = normals(200, 4)
    same, apart = manifolds(x, x), manifolds(x + 100, x)
    # Each point lies in its own ball and, to rounding, in 5 others on average: density 6 / 5.
    assert [float(v.mean()) for v in same] == [1, 1, pytest.approx(1.2, abs=0.05), 1]
    assert [float(v.mean()) for v in apart] == [0, 0, 0, 0]


def test_a_lost_mode_costs_recall_and_an_invented_one_precision():
    left, right = normals(300, 2) * 0.1, normals(300, 2, seed=1) * 0.1 + 10
    both, again = torch.cat((left, right)), normals(300, 2, seed=2) * 0.1
    lost = [float(v.mean()) for v in manifolds(again, both)]
    assert lost[0] > 0.9 and 0.4 < lost[1] <= 0.5 and 0.4 < lost[3] <= 0.5
    invented = [float(v.mean()) for v in manifolds(both, again)]
    assert 0.4 < invented[0] <= 0.5 and invented[1] > 0.9 and invented[3] > 0.9


def test_manifolds_agree_with_a_search_by_scikit_learn():
    """Another way to the same balls, over more rows than one part holds."""
    samples, data = normals(1500, 3), 1.2 * normals(1100, 3, seed=1)
    found = manifolds(samples, data)
    for k, points in ((3, data), (5, data), (3, samples)):
        search = NearestNeighbors(n_neighbors=k).fit(points.numpy())
        expected = search.kneighbors()[0][:, -1]  # without a query: others only
        assert neighbour_radii(points, (k,))[0].numpy() == pytest.approx(expected)
    inside = (torch.cdist(samples, data) <= neighbour_radii(data, (3,))[0]).any(1)
    assert torch.equal(found.precision.bool(), inside)
    inside = (torch.cdist(data, samples) <= neighbour_radii(samples, (3,))[0]).any(1)
    assert torch.equal(found.recall.bool(), inside)


@pytest.mark.parametrize("name", ["density", "coverage"])
def test_density_and_coverage_of_equal_laws_have_their_exact_means(name):
    """Naeem et al. (2020): 1, and 1 - prod_i (m - i)/(n + m - i); false alarms: 6e-7."""
    n, m, k = 30, 40, 5
    missed = math.prod((m - i) / (n + m - i) for i in range(1, k + 1))
    exact = {"density": 1.0, "coverage": 1 - missed}[name]
    found = torch.stack(
        [
            getattr(manifolds(normals(n, 2, seed=j), normals(m, 2, seed=9999 - j)), name).mean()
            for j in range(1000)
        ]
    )
    assert abs(z_of_mean(found, exact)) < LIMIT
    # Balls to the 4th neighbour instead of the 5th are rejected.
    off = {"density": 0.8, "coverage": 1 - missed / ((m - k) / (n + m - k))}[name]
    assert abs(z_of_mean(found, off)) > LIMIT


def test_too_few_points_have_no_neighbours():
    with pytest.raises(ShapeError, match="more than 5 rows"):
        manifolds(normals(5, 2), normals(50, 2))


# ---- memorisation


@pytest.mark.parametrize("jitter", [0.0, 0.02])
def test_copies_of_training_data_are_found(jitter):
    train, held_out = normals(500, 8), normals(200, 8, seed=1)
    new, copies = normals(300, 8, seed=2), train[:100] + jitter * normals(100, 8, seed=3)
    usual = nearest(held_out, train)
    found = nearest(torch.cat((copies, new)), train.split(77))
    assert torch.equal(found.index[:100, 0], torch.arange(100))
    assert bool(found.copies[:100].all()) and float(found.copies[100:].double().mean()) < 0.01
    assert float(nearer(found, usual)[:100].mean()) > 0.99
    if not jitter:
        assert float(found.distances[:100, 0].max()) == 0


def test_new_draws_are_as_far_from_the_training_data_as_held_out_ones():
    """The mean of the Mann-Whitney share is 1/2 over 300 draws; false alarms: 6e-7."""

    def share(k, shrink):
        train, held_out, new = (normals(40, 3, seed=3 * k + j) for j in range(3))
        return nearer(nearest(shrink * new, train), nearest(held_out, train)).mean()

    assert abs(z_of_mean(torch.stack([share(k, 1.0) for k in range(300)]), 0.5)) < LIMIT
    assert abs(z_of_mean(torch.stack([share(k, 0.8) for k in range(300)]), 0.5)) > LIMIT


def test_nearest_needs_two_training_states_of_the_same_size():
    with pytest.raises(ShapeError, match="at least 2"):
        nearest(normals(3, 2), normals(1, 2))
    with pytest.raises(ShapeError, match="2 numbers, the samples 3"):
        nearest(normals(3, 3), normals(9, 2))


# ---- error bars


def test_the_bootstrap_error_of_a_mean_is_the_standard_error():
    x = normals(400) * 3
    found = estimate(mean_of(x), 400, replicates=4000)
    assert found.value == pytest.approx(float(x.mean()))
    assert found.error == pytest.approx(float(x.std()) / 20, rel=0.06)
    again = estimate(mean_of(x), 400, replicates=4000)
    assert torch.equal(found.replicates, again.replicates)
    assert bool((draws(400, 50).sum(1) == 400).all())


@pytest.mark.parametrize("make", [frechet, kernel, sliced], ids=["frechet", "kernel", "sliced"])
def test_the_error_bar_of_a_distance_is_the_spread_over_new_samples(make):
    real = normals(200, 3, seed=1) + 0.5
    sets = [normals(120, 3, seed=10 + k) for k in range(60)]
    one = torch.ones(1, 120, dtype=torch.float64)
    spread = float(torch.cat([make(x, real)(one) for x in sets]).std())
    errors = [estimate(make(x, real), 120, replicates=60).error for x in sets[:8]]
    assert sum(errors) / 8 == pytest.approx(spread, rel=0.35)


def test_replicates_of_the_kernel_distance_are_not_biased_by_points_drawn_twice():
    a, b = normals(150, 3), normals(150, 3, seed=1)
    found = estimate(kernel(a, b), 150, replicates=500)
    assert abs(z_of_mean(found.replicates, found.value)) < LIMIT
    # With the pairs of a point and its own copy they lie E k(x, x) / n above.
    own = float(((a.square().sum(1) / 3 + 1) ** 3).mean()) / 150
    assert abs(z_of_mean(found.replicates + own, found.value)) > LIMIT


def test_differences_on_the_same_draws_are_paired():
    x = normals(300)
    a, b = estimate(mean_of(x), 300), estimate(mean_of(x + 0.1 + 0.01 * normals(300, seed=1)), 300)
    gap, error = difference(b, a)
    assert gap == pytest.approx(0.1, abs=0.005) and error < 0.05 * a.error
    with pytest.raises(ShapeError, match="not paired"):
        difference(a, estimate(mean_of(x), 300, replicates=10))


# ---- feature networks

MODULE = """
import torch
from torch import nn

net = nn.Linear(4, 3)

def make(width=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(4, width))

def double(x):
    return 2 * x

def broken(x):
    return x.sum()
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "my_features.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_features_are_a_module_a_function_or_a_function_that_makes_one(place):
    x = normals(7, 2, 2).float()
    assert torch.equal(load_features("my_features:double")(x), 2 * x.flatten(1))
    made = load_features(f"{place / 'my_features.py'}:make", {"width": 5})
    assert made(x).shape == (7, 5) and not made.network.training and len(made.version) == 16
    assert load_features("my_features:net")(x.flatten(1)).shape == (7, 3)


def test_feature_weights_come_from_safetensors_alone(place):
    x, other = normals(7, 4).float(), nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    save_file(other.state_dict(), "weights.safetensors")
    loaded = load_features("my_features:make", weights="weights.safetensors")
    assert torch.equal(loaded(x), other(x).detach()) and loaded.version == fingerprint(other)
    torch.save(other.state_dict(), "weights.pt")
    for weights, name, words in [
        ("weights.pt", "my_features:make", "no pickle is loaded"),
        ("weights.safetensors", "my_features:net", "do not fit"),
        ("absent.safetensors", "my_features:make", "do not fit"),
        ("weights.safetensors", "my_features:double", "no nn.Module"),
    ]:
        with pytest.raises(ArgumentError, match=words):
            load_features(name, weights=weights)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("inception", "module:object or file.py:object"),
        ("no_such_module:net", "cannot be imported"),
        ("my_features:no_such", "has no 'no_such'"),
        ("absent.py:net", "no file absent.py"),
    ],
)
def test_features_that_are_not_there_are_named(place, name, words):
    with pytest.raises(ArgumentError, match=words):
        load_features(name)


def test_features_must_give_a_row_for_each_sample(place):
    with pytest.raises(ShapeError, match="one row of features for each sample"):
        load_features("my_features:broken")(normals(7, 4))
