"""Sampling by lists of seeds, dealt to the processes of a job."""

import json

import pytest
import torch
from sdeflow_plugins.generate.sampler import Sampler
from sdeflow_plugins.generate.shards import batches, parse_seeds, sample_seeds
from sdeflow_plugins.ranks import RankError, Ranks
from sdeflow_plugins.train.recipe import Recipe

from sdeflow import ArgumentError

RECIPE = Recipe(network="mlp", network_options={"width": 16, "depth": 1})
SEEDS = [*range(20, 30), 3, 5, 4, 3]


@pytest.fixture(scope="module")
def draw():
    """Samples of a network with random weights, noise at every step."""
    denoiser = RECIPE.make_denoiser(RECIPE.make_network((2,)).eval())
    sampler = Sampler("euler_maruyama", eta=1.0)
    return lambda seeds, places: sampler.run(denoiser, (len(seeds), 2), 5, seeds)


def together(draw, folder, world, batch=4, seeds=SEEDS):
    """What rank 0 gets when the ranks run one after the other, rank 0 last."""
    for rank in reversed(range(world)):
        with sample_seeds(draw, seeds, batch, folder, {}, Ranks(rank, world)) as samples:
            assert (samples is None) == (rank > 0)
    assert not list(folder.iterdir())
    return samples


def test_any_number_of_ranks_gives_the_same_bits(tmp_path, draw):
    one = together(draw, tmp_path, 1)
    assert one.seeds == SEEDS and one.x.shape == (14, 2) and one.nfe == 5
    for world in (2, 3, 9):
        assert torch.equal(together(draw, tmp_path, world).x, one.x), world


def test_sample_i_depends_on_seed_i_alone(tmp_path, draw):
    whole = together(draw, tmp_path, 1)
    for batch in (1, 3, 14):
        other = together(draw, tmp_path, 2, batch)
        assert (other.x - whole.x).abs().max() < 1e-6 * whole.x.abs().max(), batch
    assert (whole.x[10] - whole.x[13]).abs().max() < 1e-6, "seed 3 stands at both places"
    backwards = together(draw, tmp_path, 2, 5, SEEDS[::-1])
    assert (backwards.x.flip(0) - whole.x).abs().max() < 1e-6 * whole.x.abs().max()


def test_seeds_of_the_batch_instead_are_found_out(tmp_path):
    """The planted fault of the test above: noise by the place in the batch."""
    denoiser = RECIPE.make_denoiser(RECIPE.make_network((2,)).eval())

    def draw(seeds, places):
        return Sampler().run(denoiser, (len(seeds), 2), 5, seeds[0])

    gap = together(draw, tmp_path, 1, 4).x - together(draw, tmp_path, 2, 3).x
    assert gap.abs().max() > 0.1


def test_labels_go_by_place(tmp_path):
    class Drawn:
        def __init__(self, x):
            self.x, self.nfe = x, 1

    labels = torch.arange(len(SEEDS))
    samples = together(lambda seeds, places: Drawn(labels[places]), tmp_path, 3)
    assert torch.equal(samples.x, labels)


def test_a_missing_rank_is_an_error_and_what_is_there_is_used_again(tmp_path, draw):
    drawn = []

    def spy(seeds, places):
        drawn.extend(seeds)
        return draw(seeds, places)

    with pytest.raises(RankError, match=r"1 of 4 batches are missing.*those of rank 2: see"):
        for rank in (1, 0):
            with sample_seeds(spy, SEEDS, 4, tmp_path, {}, Ranks(rank, 3), patience=0.3):
                pass
    assert sorted(drawn) == sorted([*SEEDS[:8], *SEEDS[12:]])
    drawn.clear()
    assert torch.equal(together(spy, tmp_path, 1).x, together(draw, tmp_path, 1).x)
    assert drawn == SEEDS[8:12]


def test_files_stay_when_the_block_fails_and_a_broken_one_is_drawn_again(tmp_path, draw):
    with pytest.raises(OSError, match="disk"), sample_seeds(draw, SEEDS, 4, tmp_path, {}):
        raise OSError("disk full")
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 4
    files[1].write_bytes(files[1].read_bytes()[:-1])
    drawn = []
    with sample_seeds(
        lambda seeds, places: drawn.append(seeds) or draw(seeds, places), SEEDS, 4, tmp_path, {}
    ) as samples:
        assert drawn == [SEEDS[4:8]] and len(samples.x) == 14
    assert not list(tmp_path.iterdir())


def test_another_job_does_not_take_the_files(tmp_path, draw):
    with pytest.raises(OSError), sample_seeds(draw, SEEDS, 4, tmp_path, {"steps": 4}):
        raise OSError
    drawn = []
    with sample_seeds(
        lambda seeds, places: drawn.extend(seeds) or draw(seeds, places),
        SEEDS,
        4,
        tmp_path,
        {"steps": 5},
    ):
        assert drawn == SEEDS
    assert len(list(tmp_path.iterdir())) == 1, "the first job's files are still there"


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_every_place_is_dealt_once(world):
    dealt = [places for rank in range(world) for _, places in batches(50, 8, rank, world)]
    assert sorted(i for places in dealt for i in range(50)[places]) == list(range(50))


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("0-3", [0, 1, 2, 3]),
        ("0-2,20,30-31", [0, 1, 2, 20, 30, 31]),
        (" 7 , 7,1-1", [7, 7, 1]),
        ("[7, 8]", [7, 8]),
        ([5, 4], [5, 4]),
        (3, [3]),
        (torch.tensor([1, 2]), [1, 2]),
    ],
    ids=["range", "ranges", "spaces", "brackets", "list", "int", "tensor"],
)
def test_seeds_are_read(text, seeds):
    assert parse_seeds(text) == seeds
    assert json.dumps(parse_seeds(text)) == json.dumps(seeds), "plain ints"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("9-0", "'9-0': the range 9-0 runs backwards"),
        ("1,,2", "'' is neither"),
        ("a-b", "'a-b' is neither a whole number >= 0 nor a range"),
        ("-3", "'-3' is neither"),
        ("1.5", "'1.5' is neither"),
        ("", "'' is neither"),
        ("0-99999999999", "are more than 10,000,000"),
        ("0-6000000,0-6000000", "are more than 10,000,000"),
        (str(2**63), "must be in"),
        ([], "is empty"),
        ([1, -1], "must be in"),
        ([True], "seed=True"),
        ([0.5], "seed=0.5"),
    ],
)
def test_bad_seeds_are_refused(text, words):
    with pytest.raises(ArgumentError, match=words):
        parse_seeds(text)
