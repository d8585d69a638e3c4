"""The noise contract: each sample has a stream of its own, and nobody else's generator moves."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ztest import LIMIT, ks_excess, z_of_correlation, z_of_mean, z_of_variance

from sdeflow import ArgumentError, SeededNoise
from sdeflow.noise import fresh_seed, start

T, S = torch.tensor(1.0).double(), torch.tensor(0.5).double()
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

seeds = st.integers(0, 2**63 - 1)
shapes = st.lists(st.integers(1, 7), min_size=0, max_size=3).map(tuple)


@given(seeds, st.integers(1, 9), st.integers(0, 20), shapes, st.sampled_from(DTYPES))
def test_a_small_batch_is_the_beginning_of_a_large_one(seed, small, more, shape, dtype):
    few = SeededNoise(seed, (small, *shape), dtype)
    many = SeededNoise(seed, (small + more, *shape), dtype)
    for _ in range(3):
        assert torch.equal(few(T, S), many(T, S)[:small])


@given(st.lists(seeds, min_size=1, max_size=6), shapes, st.sampled_from(DTYPES))
def test_a_seed_of_its_own_makes_a_sample_the_first_of_that_seed(own, shape, dtype):
    together = SeededNoise(own, (len(own), *shape), dtype)
    alone = [SeededNoise(seed, (1, *shape), dtype) for seed in own]
    for _ in range(3):
        assert torch.equal(together(T, S), torch.cat([noise(T, S) for noise in alone]))


@given(st.permutations(range(5)), shapes)
def test_permuted_seeds_permute_the_samples(order, shape):
    straight = SeededNoise(range(5), (5, *shape)).draw(3)
    assert torch.equal(SeededNoise(order, (5, *shape)).draw(3), straight[list(order)])


def test_equal_seeds_repeat_and_calls_differ():
    a, b = SeededNoise(5, (2, 3)), SeededNoise(5, (2, 3))
    first, second = a(T, S), a(T, S)
    assert torch.equal(first, b(T, S)) and torch.equal(second, b(T, S))
    assert not (first == second).any()
    assert not (first == SeededNoise(6, (2, 3))(T, S)).any()


def test_a_call_can_be_drawn_again_by_its_number():
    noise = SeededNoise(5, (2, 3))
    first, second = noise(T, S), noise(T, S)
    assert torch.equal(noise.draw(1), first) and torch.equal(noise.draw(2), second)


def test_the_start_is_call_zero():
    z = start(5, (4, 2), torch.float64, torch.device("cpu"))
    assert torch.equal(z, SeededNoise(5, (4, 2), torch.float64, first=0)(T, S))
    assert not (z == SeededNoise(5, (4, 2), torch.float64)(T, S)).any()


def test_no_two_small_seeds_begin_alike():
    begun = {float(start(k, (1,), torch.float64, torch.device("cpu"))) for k in range(2000)}
    assert len(begun) == 2000


def test_global_generators_are_left_alone():
    numpy_before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    SeededNoise(5, (4, 2))(T, S)
    SeededNoise([1, 2], (2, 2))(T, S)
    fresh_seed()
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert (np.random.get_state()[1] == numpy_before).all()
    torch.manual_seed(123)
    moved = SeededNoise(5, (4, 2))(T, S)
    assert torch.equal(moved, SeededNoise(5, (4, 2)).draw(1))


def test_fresh_seeds_differ_and_are_seeds():
    drawn = {fresh_seed() for _ in range(20)}
    assert len(drawn) > 15  # 20 of 2^31: a repeat once in 10 million runs
    assert all(SeededNoise(seed, (1,)).seed == seed for seed in drawn)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dtype_is_kept_and_low_precision_is_float32_rounded(dtype):
    z = SeededNoise(3, (5, 4), dtype)(T, S)
    wide = SeededNoise(3, (5, 4), torch.float32)(T, S)
    assert z.dtype == dtype and z.shape == (5, 4)
    if dtype != torch.float64:
        assert torch.equal(z, wide.to(dtype))


def test_float64_has_all_its_digits():
    z = SeededNoise(3, (1000,), torch.float64)(T, S)
    assert (z != z.float().double()).sum() > 990


def test_an_empty_batch_gets_no_noise():
    assert SeededNoise(3, (0, 4))(T, S).shape == (0, 4)


class OneCallForAll(SeededNoise):
    """A planted fault: the number of the call does not matter."""

    def draw(self, call):
        return super().draw(1)


class OneSampleForAll(SeededNoise):
    """A planted fault: every sample gets the first one's noise."""

    def draw(self, call):
        return super().draw(call)[:1].expand(self.shape)


class Uniform(SeededNoise):
    """A planted fault: zero mean and unit variance, but not normal."""

    def draw(self, call):
        z = super().draw(call)
        return (torch.special.ndtr(z) - 0.5) * math.sqrt(12)


def faults(noise):
    """What is statistically wrong with a source of (64, 500) unit normals.

    Twelve z-tests and a KS test, each with a false-alarm rate below 1e-6.
    """
    calls = [noise(T, S).double() for _ in range(3)]
    wrong = {
        "mean": max(abs(z_of_mean(z, 0.0)) for z in calls) > LIMIT,
        "variance": max(abs(z_of_variance(z, 1.0)) for z in calls) > LIMIT,
        "calls": max(abs(z_of_correlation(calls[i], calls[j])) for i, j in ((0, 1), (1, 2), (0, 2)))
        > LIMIT,
        "samples": max(abs(z_of_correlation(z[:-1], z[1:])) for z in calls) > LIMIT,
        "law": ks_excess(torch.special.ndtr(calls[0])) > 1,
    }
    return {name for name, is_wrong in wrong.items() if is_wrong}


@pytest.mark.parametrize("seed", [0, 2**40, range(64), range(1000, 1064)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_normal_and_independent_over_calls_and_samples(seed, dtype):
    assert faults(SeededNoise(seed, (64, 500), dtype)) == set()


def test_neighbouring_seeds_are_independent():
    """Six z-tests, each with a false-alarm rate below 1e-6."""
    for call in (0, 1, 2):
        a, b, c = (SeededNoise(seed, (20_000,)).draw(call) for seed in (7, 8, 9))
        assert abs(z_of_correlation(a, b)) < LIMIT and abs(z_of_correlation(b, c)) < LIMIT


def test_the_same_tests_reject_planted_faults():
    assert "calls" in faults(OneCallForAll(0, (64, 500)))
    assert "samples" in faults(OneSampleForAll(0, (64, 500)))
    assert faults(Uniform(0, (64, 500))) == {"law"}
    assert "variance" in faults(lambda t, s: 1.05 * SeededNoise(0, (64, 500))(t, s))
    assert "mean" in faults(lambda t, s: 0.05 + SeededNoise(0, (64, 500))(t, s))


@pytest.mark.parametrize(
    "seed",
    [True, -1, 1.5, None, 2**63, [1, 2.5], [1, True], [1, -1], "ab", torch.tensor(1.5)],
    ids=repr,
)
def test_bad_seeds_are_refused_by_name(seed):
    with pytest.raises(ArgumentError, match=r"seed=.*\[0, 2\^63\)"):
        SeededNoise(seed, (2, 3))


def test_a_sequence_of_seeds_has_one_a_sample():
    with pytest.raises(ArgumentError, match="seed has 2 entries for a batch of 3; give one a"):
        SeededNoise([1, 2], (3, 3))


@pytest.mark.parametrize("many", [np.arange(3), torch.arange(3), range(3), (0, 1, 2)], ids=repr)
def test_seeds_may_come_from_an_array(many):
    assert torch.equal(SeededNoise(many, (3, 2)).draw(1), SeededNoise([0, 1, 2], (3, 2)).draw(1))


def test_hypothesis_seeds_torch_so_that_failures_replay():
    seen = []

    @given(st.integers())
    def look(_):
        seen.append(float(torch.rand(())))

    for seed in (1, 2):
        torch.manual_seed(seed)
        look()
    assert len(seen) > 20 and len(set(seen)) == 1
