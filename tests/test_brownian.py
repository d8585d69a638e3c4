"""Brownian paths: their law, and that whatever is asked of them is one and the same path."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ztest import LIMIT, ks_excess, z_of_correlation, z_of_mean, z_of_variance

import sdeflow.brownian
import sdeflow.tree
from sdeflow import (
    OU,
    ArgumentError,
    BrownianPath,
    BrownianTree,
    EulerMaruyama,
    GridError,
    SeededNoise,
    ShapeError,
    StepSolver,
    integrate,
)
from sdeflow.noise import area

seeds = st.integers(0, 2**63 - 1)
shapes = st.lists(st.integers(1, 5), min_size=0, max_size=2).map(tuple)
DTYPES = [torch.float16, torch.float32, torch.float64]


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def grids(draw, most=300):
    """Nodes from 0 at unequal distances, up or down."""
    steps = torch.tensor(draw(st.lists(st.floats(0.01, 1), min_size=3, max_size=9))).double()
    steps = steps.repeat(draw(st.integers(1, most // 9)))
    ts = torch.cat((double(0.0), steps.cumsum(0)))
    return ts.flip(0) if draw(st.booleans()) else ts


@st.composite
def paths(draw):
    """A path of either kind, and three increasing times that it knows."""
    seed, shape = draw(seeds), (draw(st.integers(1, 3)), *draw(shapes))
    if draw(st.booleans()):
        ts = draw(grids())
        places = draw(st.lists(st.integers(0, len(ts) - 1), min_size=3, max_size=3, unique=True))
        return BrownianPath(seed, shape, ts), ts[places].sort().values
    T = draw(st.floats(0.1, 50))
    places = draw(st.lists(st.integers(0, 999), min_size=3, max_size=3, unique=True))
    return BrownianTree(seed, shape, T), T * double(*places).sort().values / 999


def increment(path, t, s):
    """W_s - W_t and INT_t^s (W_u - W_t) du, from the unit normals."""
    h, z, zeta = s - t, path(t, s), path.area(t, s)
    return h.abs().sqrt() * z, h * h.abs().sqrt() * (z / 2 + zeta / 12**0.5)


# ---- one path


@given(paths())
def test_increments_and_areas_of_parts_make_those_of_the_whole(given):
    path, (t, m, s) = given
    (w, i), (w_1, i_1), (w_2, i_2) = (increment(path, *ends) for ends in ((t, s), (t, m), (m, s)))
    size = float(s) ** 0.5
    assert torch.allclose(w, w_1 + w_2, rtol=0, atol=1e-13 * size)
    assert torch.allclose(i, i_1 + (s - m) * w_1 + i_2, rtol=0, atol=1e-12 * size**3)


@given(paths())
def test_backwards_the_increment_changes_sign_and_the_area_does_not(given):
    path, (t, _, s) = given
    assert torch.equal(path(s, t), -path(t, s))
    assert torch.allclose(path.area(s, t), path.area(t, s), rtol=0, atol=1e-9)
    (w, i), (_, back) = increment(path, t, s), increment(path, s, t)
    # INT_s^t (W_u - W_s) du = -INT_t^s (W_u - W_t) du + (s - t) (W_s - W_t)
    assert torch.allclose(back, -i + (s - t) * w, rtol=0, atol=1e-11 * float(s) ** 1.5)


@given(paths())
def test_the_path_does_not_depend_on_what_was_asked_before(given):
    path, (t, m, s) = given
    first = path(t, m), path.area(m, s)
    path(t, s), path.area(t, s), path(s, m)
    assert torch.equal(path(t, m), first[0]) and torch.equal(path.area(m, s), first[1])


@settings(max_examples=40)
@given(seeds, st.integers(1, 5), st.integers(1, 70), shapes, grids(60), st.sampled_from(DTYPES))
def test_a_small_batch_is_the_beginning_of_a_large_one(seed, small, more, shape, ts, dtype):
    t, s, m = ts[0], ts[-1], ts[len(ts) // 2]
    for make in (
        lambda batch: BrownianPath(seed, (batch, *shape), ts, dtype),
        lambda batch: BrownianTree(seed, (batch, *shape), float(ts.max()), dtype),
    ):
        few, many = make(small), make(small + more)
        for ends in ((t, s), (t, m), (m, s)):
            assert torch.equal(few(*ends), many(*ends)[:small])
            assert torch.equal(few.area(*ends), many.area(*ends)[:small])
            assert few(*ends).dtype == dtype


@settings(max_examples=40)
@given(st.lists(seeds, min_size=1, max_size=4), shapes, grids(60))
def test_a_seed_of_its_own_makes_a_sample_the_first_of_that_seed(own, shape, ts):
    for make in (
        lambda seed, batch: BrownianPath(seed, (batch, *shape), ts),
        lambda seed, batch: BrownianTree(seed, (batch, *shape), float(ts.max())),
    ):
        together, alone = make(own, len(own)), [make(seed, 1) for seed in own]
        for ask in ("__call__", "area"):
            every = [getattr(path, ask)(ts[0], ts[-1]) for path in alone]
            assert torch.equal(getattr(together, ask)(ts[0], ts[-1]), torch.cat(every))


@given(st.integers(0, 2**40), shapes, st.lists(st.floats(0, 3), min_size=4, max_size=4))
def test_a_tree_asked_at_own_times_says_what_it_says_at_one_time(seed, shape, times):
    tree = BrownianTree(seed, (4, *shape), 3.0)
    w, j = tree.at(double(*times))
    for k, t in enumerate(times):
        one_w, one_j = tree.at(t)
        assert torch.equal(w[k], one_w[k]) and torch.equal(j[k], one_j[k])
    many_w, many_j = tree.at(double(*times).reshape(-1, 1))
    assert torch.equal(many_w[2], tree.at(times[2])[0])
    assert torch.equal(many_j[3], tree.at(times[3])[1])


def test_a_large_batch_of_a_tree_in_pieces_is_the_same_path(monkeypatch):
    t, s = torch.rand(2, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = BrownianTree(3, (300, 5))(t, s)
    monkeypatch.setattr(sdeflow.tree, "AT_ONCE", 1000)
    assert torch.equal(BrownianTree(3, (300, 5))(t, s), whole)


def test_no_generator_is_moved():
    numpy_before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    BrownianPath(1, (2,), [0, 1, 2]).area(0.0, 2.0)
    BrownianTree(1, (2,)).area(0.0, 1.0)
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert (np.random.get_state()[1] == numpy_before).all()


def test_values_are_the_sums_of_the_increments_from_the_first_node():
    for ts in (torch.linspace(0, 2, 301).double(), torch.linspace(2, 0, 301).double()):
        path = BrownianPath(5, (3, 2), ts)
        values = path.values()
        assert values.shape == (301, 3, 2) and not values[0].any()
        w, i = path.increment(ts[0], ts[-1])
        assert torch.allclose(values[-1], w, atol=1e-12)
        assert torch.allclose(path.values(ts[::50]), values[::50], atol=1e-12)
        # The integral by the trapezoid rule on the nodes, whose own areas are all it misses.
        trapezoid = torch.trapezoid(values, ts, dim=0)
        assert (trapezoid - i).abs().max() < 6 * (2 * (2 / 300) ** 2 / 12) ** 0.5


# ---- through the driver


def wiener():
    return OU(theta=1e-300, volatility=1.0, T=2.0)


@pytest.mark.parametrize("steps", [1, 8, 64])
def test_runs_with_different_steps_see_one_path(steps):
    fine = torch.linspace(0, 2, 65).double()
    for path in (BrownianPath(7, (3, 2), fine), BrownianTree(7, (3, 2), 2.0)):
        end = integrate(
            wiener(), torch.zeros(3, 2).double(), fine[:: 64 // steps], EulerMaruyama(), noise=path
        ).x
        assert torch.allclose(end, 2**0.5 * path(fine[0], fine[-1]), atol=1e-12)


def test_a_run_may_begin_anywhere_and_its_area_reaches_the_solver():
    class Integral(StepSolver):
        """The integral of the path, exactly."""

        def step(self, process, x, t, s, noise, memory):
            h, z = s - t, noise(t, s)
            made = h * h.sqrt() * (z / 2 + area(noise, t, s) / 12**0.5)
            w, i = x.unbind(1)
            return torch.stack((w + h.sqrt() * z[:, 0], i + h * w + made[:, 0]), 1), None

    ts = torch.linspace(0, 2, 65).double()
    path = BrownianPath(7, (3, 2), ts)
    end = integrate(wiener(), torch.zeros(3, 2).double(), ts[16::8], Integral(), noise=path).x
    w, i = path.increment(ts[16], ts[-1])
    assert torch.allclose(end, torch.stack((w[:, 0], i[:, 0]), 1), atol=1e-12)


def test_the_area_of_a_source_without_one_is_a_second_call():
    t, s = double(0.0, 1.0)
    noise, again = SeededNoise(3, (4, 2)), SeededNoise(3, (4, 2))
    first, second = noise(t, s), area(noise, t, s)
    assert torch.equal(first, again.draw(1)) and torch.equal(second, again.draw(2))
    path = BrownianTree(3, (4, 2))
    assert torch.equal(area(path, t, s), path.area(t, s))


def test_noise_of_the_wrong_shape_is_named():
    class Short(BrownianTree):
        def area(self, t, s):
            return super().area(t, s)[:1]

    class UsesArea(StepSolver):
        def step(self, process, x, t, s, noise, memory):
            return x + area(noise, t, s), None

    with pytest.raises(ShapeError, match=r"noise.area\(t, s\) returned shape \(1, 2\).*\(3, 2\)"):
        integrate(wiener(), torch.zeros(3, 2), [0.0, 1.0], UsesArea(), noise=Short(1, (3, 2)))


# ---- the law

SPLITS = double(0.0, 0.11, 0.3, 0.301, 0.5, 0.53, 0.9, 1.2, 2.0)
"""Steps of many lengths, some along halves of the whole and some across."""


def fine_path(seed, shape):
    nodes = torch.cat((SPLITS, torch.linspace(0, 2, 80).double()[1:-1])).sort().values
    return BrownianPath(seed, shape, nodes)


def nodes_path(seed, shape):
    return BrownianPath(seed, shape, SPLITS)


def tree(seed, shape):
    return BrownianTree(seed, shape, 2.0)


def shallow_tree(seed, shape):
    """Its last level is 2/16 long: each time has an interval of its own but 0.3 and 0.301."""
    return BrownianTree(seed, shape, 2.0, depth=4)


def faults(path, splits=SPLITS):
    """What is statistically wrong with the unit normals of consecutive steps.

    z-tests of every mean, variance and correlation of the normals and areas of all steps, and a KS
    test of each; about 170 tests, each with a false-alarm rate below 1e-6.
    """
    steps = list(zip(splits[:-1], splits[1:], strict=True))
    z = [path(t, s).flatten() for t, s in steps]
    zeta = [path.area(t, s).flatten() for t, s in steps]
    rows = z + zeta
    wrong = set()
    for k, row in enumerate(rows):
        name = "increment" if k < len(z) else "area"
        if abs(z_of_mean(row, 0.0)) > LIMIT:
            wrong.add(f"mean of {name}")
        if abs(z_of_variance(row, 1.0)) > LIMIT:
            wrong.add(f"variance of {name}")
        if ks_excess(torch.special.ndtr(row)) > 1:
            wrong.add(f"law of {name}")
        if any(abs(z_of_correlation(row, other)) > LIMIT for other in rows[:k]):
            wrong.add("correlation")
    samples = path(splits[0], splits[-1])
    if abs(z_of_correlation(samples[:-1], samples[1:])) > LIMIT:
        wrong.add("samples")
    if abs(z_of_correlation(samples[:, :-1], samples[:, 1:])) > LIMIT:
        wrong.add("components")
    return wrong


@pytest.mark.parametrize("seed", [0, 2**62 + 1, range(500, 550)], ids=["0", "large", "own"])
@pytest.mark.parametrize("make", [fine_path, nodes_path, tree])
def test_increments_and_areas_are_independent_normals(make, seed):
    assert faults(make(seed, (50, 200))) == set()


def test_the_law_holds_at_times_inside_the_last_level():
    apart = double(0.0, 0.13, 0.3, 0.45, 0.6, 0.9, 1.2, 1.87, 2.0)
    assert faults(shallow_tree(0, (50, 200)), apart) == set()


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=12), seeds)
@settings(max_examples=15)
def test_a_step_over_any_intervals_has_unit_normals(steps, seed):
    """Four z-tests an example, each with a false-alarm rate below 1e-6."""
    ts = torch.cat((double(0.0), torch.tensor(steps).double().cumsum(0)))
    path = BrownianPath(seed, (4000,), ts)
    z, zeta = path(ts[0], ts[-1]), path.area(ts[0], ts[-1])
    assert abs(z_of_variance(z, 1.0)) < LIMIT and abs(z_of_variance(zeta, 1.0)) < LIMIT
    assert abs(z_of_correlation(z, zeta)) < LIMIT
    assert abs(z_of_correlation(z, path.area(ts[0], ts[1]))) < LIMIT


class LevelsAlike(BrownianTree):
    """A planted fault: an interval has the numbers of its place, on any level."""

    def _sums(self, t, keys):
        count, scale = self._levels
        scaled = (t / self.T).clamp(max=1.0) * count
        place = torch.minimum(scaled.long(), count - 1)
        z, n = sdeflow.tree._normal_pairs(keys, torch.cat((place[:1], place)))
        weights = (scale * sdeflow.tree._weights(scaled - place)).unsqueeze(-1).transpose(1, 2)
        return (weights[0] * z.unsqueeze(1) + weights[1] * n.unsqueeze(1)).sum(0)


def planted(monkeypatch, place, weights):
    """The tree with what its normals weigh changed by `weights`, at `place`."""
    true = sdeflow.tree._weights

    def wrong(x):
        rows = true(x).clone()
        rows[place] = weights(rows[place])
        return rows

    monkeypatch.setattr(sdeflow.tree, "_weights", wrong)
    return tree(0, (50, 200))


def test_the_same_tests_reject_planted_faults(monkeypatch):
    assert "correlation" in faults(LevelsAlike(0, (50, 200), 2.0))
    with monkeypatch.context() as patch:  # the area's normal left out of the increments
        assert "variance of increment" in faults(planted(patch, (1, 0), lambda w: 0 * w))
    with monkeypatch.context() as patch:  # linear interpolation between the ends
        assert "law of area" in faults(planted(patch, (slice(None), 1), lambda w: 0 * w))
    with monkeypatch.context() as patch:  # the right half has the sign of the left
        assert "correlation" in faults(planted(patch, (1, 0), torch.abs))

    class OneSample(BrownianPath):
        def __call__(self, t, s):
            return super().__call__(t, s)[:1].expand(self.shape)

    class AreaOfTheIncrement(BrownianPath):
        def area(self, t, s):
            return self(t, s)

    class UncombinedArea(BrownianPath):
        """The areas of the intervals without that of the steps between them."""

        def area(self, t, s):
            low, high = sorted(self._ends(t, s))
            h = self._nodes[high] - self._nodes[low]
            parts = (
                ((b - a) / h) ** 1.5 * super(UncombinedArea, self).area(a, b)
                for a, b in itertools.pairwise(self._nodes[low : high + 1])
            )
            return sum(parts)

    nodes = fine_path(0, (1,)).ts
    assert "samples" in faults(OneSample(0, (50, 200), nodes))
    assert "correlation" in faults(AreaOfTheIncrement(0, (50, 200), nodes))
    assert "variance of area" in faults(UncombinedArea(0, (50, 200), nodes))


def test_two_times_in_one_interval_of_the_last_level_are_refused():
    path = shallow_tree(0, (2,))
    with pytest.raises(ArgumentError, match=r"0.001 apart.*resolves T 2\^-depth = 0.125.*now 4"):
        path(double(0.3)[0], double(0.301)[0])


@pytest.mark.parametrize("h", [1e-2, 1e-4, 1e-6])
def test_the_area_of_a_tree_loses_what_it_says_to_rounding(h):
    """Against the areas of the two halves, which lose more, combined."""
    path = BrownianTree(1, (2000,), depth=40)
    t, m, s = double(0.7, 0.7 + h / 2, 0.7 + h)
    halves = (path.area(t, m) + path.area(m, s)) / 8**0.5
    halves = halves + (path(t, m) - path(m, s)) * (3 / 8) ** 0.5
    assert (path.area(t, s) - halves).abs().max() < 20e-15 * h**-1.5 + 1e-12


# ---- a million steps


def test_a_million_steps_need_no_memory_and_no_recursion():
    ts = torch.linspace(0, 1, 10**6 + 1, dtype=torch.float64)
    path = BrownianPath(3, (2,), ts)
    whole = path(ts[0], ts[-1])
    parts = sum(path(a, b) for a, b in zip(ts[:-1:50_000], ts[50_000::50_000], strict=True))
    assert torch.allclose(whole, parts / 20**0.5, atol=1e-12)
    assert sum(block.numel() for _, block in path._held.values()) <= 2 * 128 * 2
    late = path(ts[999_000], ts[999_001])
    assert torch.equal(BrownianPath(3, (2,), ts)(ts[999_000], ts[999_001]), late)


# ---- refusals


def test_a_time_that_is_no_node_is_refused_with_its_neighbours():
    path = BrownianPath(0, (2,), [0.0, 0.25, 1.0])
    with pytest.raises(ArgumentError, match=r"t=0.3 is no node.*0.25 and 1.0.*BrownianTree"):
        path(double(0.0)[0], double(0.3)[0])
    with pytest.raises(ArgumentError, match=r"t=1.5 is no node.*nearest: 1.0\)"):
        path.area(double(0.0)[0], double(1.5)[0])
    with pytest.raises(ArgumentError, match="t=nan is no node"):
        path(double(math.nan)[0], double(1.0)[0])
    assert torch.equal(path(0.0, 0.25 + 1e-12), path(0.0, 0.25))  # a node computed anew


def test_a_path_has_one_time_for_the_batch_and_steps_have_a_length():
    path = BrownianPath(0, (2,), [0.0, 0.25, 1.0])
    with pytest.raises(ArgumentError, match=r"t has shape \(2,\).*BrownianTree"):
        path(double(0.0, 0.0), double(1.0, 1.0))
    with pytest.raises(ArgumentError, match="t=0.25 and s=0.25 are one node"):
        path(0.25, 0.25)
    with pytest.raises(GridError, match="strictly monotone"):
        BrownianPath(0, (2,), [0.0, 1.0, 1.0])
    with pytest.raises(ArgumentError, match="seed has 3 entries for a batch of 2"):
        BrownianPath([1, 2, 3], (2,), [0.0, 1.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"T": 0}, "T=0 must be a positive time"),
        ({"T": math.nan}, "T=nan must be"),
        ({"T": True}, "T=True must be"),
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"depth": 60}, r"depth=60 must be in \[1, 48\]"),
        ({"seed": -1}, "seed=-1 must be"),
    ],
    ids=str,
)
def test_a_tree_of_wrong_measures_is_refused_by_name(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        BrownianTree(**{"seed": 0, "shape": (2,)} | arguments)


def test_a_tree_is_asked_within_its_times_one_for_all_or_one_a_sample():
    path = BrownianTree(0, (4, 2), 2.0)
    with pytest.raises(ArgumentError, match=r"t=2.5 must be in \[0, T = 2.0\].*its T"):
        path(double(0.0)[0], double(2.5)[0])
    with pytest.raises(ArgumentError, match="t=nan must be in"):
        path.at(math.nan)
    with pytest.raises(ShapeError, match=r"t has shape \(3,\); it must be \(\) or \(4,\)"):
        path(double(0.0, 0.0, 0.0), double(1.0, 1.0, 1.0))


def test_empty_batches_have_empty_paths():
    assert BrownianTree(0, (0, 3))(double(0.0)[0], double(1.0)[0]).shape == (0, 3)
    assert BrownianTree(0, (3, 0)).area(double(0.0)[0], double(1.0)[0]).shape == (3, 0)
    assert BrownianPath(0, (0, 3), [0, 1, 2]).area(0.0, 2.0).shape == (0, 3)
