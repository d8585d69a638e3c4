"""The order of the data and the noise of a step: functions of (seed, step, place) alone."""

import dataclasses

import pytest
import torch
from sdeflow_plugins.train.order import Batches, Labelled, Noise, key, rows
from sdeflow_plugins.train.recipe import Recipe
from ztest import LIMIT, ks_excess, z_of_correlation, z_of_mean, z_of_variance

from sdeflow import VP, ArgumentError

RECIPE = Recipe(batch_size=12, steps=5, device="cpu")


def noise(recipe=RECIPE, seed=0):
    return Noise.draw(recipe, VP(), (3,), torch.Generator().manual_seed(seed))


def places(recipe, world):
    """The places of the batch as (rank, part) get them, in that order."""
    every = torch.arange(recipe.batch_size)
    parts = range(recipe.accumulate)
    return [every[rows(recipe, p, r, world)].tolist() for r in range(world) for p in parts]


def test_batches_see_every_sample_once_an_epoch_and_start_anywhere():
    recipe = dataclasses.replace(RECIPE, batch_size=4)
    batches = list(Batches(10, recipe, 0))
    row = [index for batch in batches for index in batch]
    assert sorted(row[:10]) == sorted(row[10:]) == list(range(10)) and row[:10] != row[10:]
    assert list(Batches(10, recipe, 3)) == batches[3:] and len(Batches(10, recipe, 3)) == 2
    assert list(Batches(10, dataclasses.replace(recipe, seed=1), 0)) != batches


def test_fewer_rows_than_a_batch_repeat_and_each_is_seen_as_often():
    row = [index for batch in Batches(5, RECIPE, 0) for index in batch]
    assert len(row) == 60 and all(row.count(index) == 12 for index in range(5))
    assert sorted(row[:5]) == sorted(row[5:10]) == list(range(5))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_ranks_and_parts_share_the_batch_of_one(world, parts):
    recipe = dataclasses.replace(RECIPE, batch_size=24, accumulate=parts)
    found = places(recipe, world)
    assert sorted(sum(found, [])) == list(range(24)) and len({len(f) for f in found}) == 1
    whole = list(Batches(10, dataclasses.replace(recipe, accumulate=1), 0))
    for rank in range(world):
        own = list(Batches(10, recipe, 0, rank, world))
        assert len(own) == parts * len(whole)
        for k, part in enumerate(own):
            here = found[rank * parts + k % parts]
            assert part == [whole[k // parts][place] for place in here]


@pytest.mark.parametrize("world", [2, 3])
def test_the_noise_of_a_place_is_the_same_for_every_number_of_ranks(world):
    recipe, whole = dataclasses.replace(RECIPE, accumulate=2), noise()
    for rank in range(world):
        for part in range(2):
            own = noise(recipe)[rows(recipe, part, rank, world)]
            for k, place in enumerate(range(part * 6 + rank, (part + 1) * 6, world)):
                assert own.t[k] == whole.t[place] and own.uniforms[k] == whole.uniforms[place]
                assert torch.equal(own.normals[k], whole.normals[place])


def test_noise_depends_on_its_seed():
    a, b, c = noise(), noise(), noise(seed=1)
    assert torch.equal(a.normals, b.normals) and torch.equal(a.t, b.t)
    assert not torch.equal(a.normals, c.normals) and not torch.equal(a.t, c.t)


def draws(n=200):
    recipe = dataclasses.replace(RECIPE, batch_size=64)
    return [noise(recipe, key(0, step)) for step in range(n)]


def laws(found):
    """What the laws of the noise are off by, each in units of its limit."""
    normals = torch.cat([d.normals for d in found])
    sde, t = VP(), torch.cat([d.t for d in found])
    uniforms = torch.cat([d.uniforms for d in found])
    neighbours = [torch.stack([d.normals[:, 0] for d in some]) for some in (found[1:], found[:-1])]
    return {
        "mean": abs(z_of_mean(normals.flatten(), 0.0)) / LIMIT,
        "variance": abs(z_of_variance(normals.flatten(), 1.0)) / LIMIT,
        "steps": abs(z_of_correlation(*neighbours)) / LIMIT,
        "time and noise": abs(z_of_correlation(t, normals[:, 0])) / LIMIT,
        "time and drop": abs(z_of_correlation(t, uniforms)) / LIMIT,
        "times": ks_excess((t - sde.t_min) / (sde.T - sde.t_min)),
        "uniforms": ks_excess(uniforms),
    }


def test_the_noise_of_all_steps_together_follows_its_laws():
    """A false alarm below 1e-5; planted faults: the same noise twice, and times used twice."""
    found = draws()
    assert max(laws(found).values()) < 1
    twice = [found[step // 2] for step in range(len(found))]
    assert laws(twice)["steps"] > 1
    reused = [dataclasses.replace(d, uniforms=d.t.float()) for d in found]
    assert laws(reused)["time and drop"] > 1


def test_every_batch_has_one_time_in_each_cell():
    sde = VP()
    for d in draws(3):
        cells = (64 * (d.t - sde.t_min) / (sde.T - sde.t_min)).long()
        assert sorted(cells.tolist()) == list(range(64)) and cells.tolist() != list(range(64))


class Plain(torch.utils.data.Dataset):
    labels = [7, 8, 9]

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return torch.tensor([float(index)])


class Batched(Plain):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


@pytest.mark.parametrize("kind", [Plain, Batched])
def test_a_labelled_data_set_gives_each_sample_its_label(kind):
    data = Labelled(kind())
    assert len(data) == 3 and [int(v) for v in data[2]] == [2, 9]
    assert [(int(x), int(y)) for x, y in data.__getitems__([2, 0])] == [(2, 9), (0, 7)]


def test_a_batch_is_a_multiple_of_its_parts():
    with pytest.raises(ArgumentError, match="batch_size=12 must be a multiple of accumulate=5"):
        dataclasses.replace(RECIPE, accumulate=5)
