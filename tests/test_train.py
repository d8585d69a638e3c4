"""Training: the loop, its checkpoints, the recipe and the run folder."""

import csv
import dataclasses
import math

import pytest
import torch
from sdeflow_plugins.build import build
from sdeflow_plugins.train import checkpoint
from sdeflow_plugins.train.engine import make_fabric
from sdeflow_plugins.train.loop import learning_rate, training
from sdeflow_plugins.train.order import Batches
from sdeflow_plugins.train.recipe import Recipe
from sdeflow_plugins.train.run import Run
from sdeflow_plugins.train.session import train_run
from sdeflow_plugins.train.state import State, moving_average

from sdeflow import VP, ArgumentError, NonFiniteError

SMALL = Recipe(
    data="moons",
    data_options={"n": 256},
    network="mlp",
    network_options={"width": 16, "depth": 1},
    steps=12,
    batch_size=32,
    warmup=2,
    device="cpu",
    log_every=4,
    save_every=6,
)
IMAGES = dataclasses.replace(
    SMALL, data="digits", data_options={}, network="unet", network_options={"channels": [8, 16]}
)


def begin(recipe):
    """(data set, state, fabric) before the first step."""
    dataset, fabric = recipe.make_dataset(), make_fabric(recipe)
    return dataset, State.fresh(recipe, dataset.shape, fabric.device), fabric


def train_to_the_end(recipe):
    dataset, state, fabric = begin(recipe)
    return list(training(recipe, dataset, state, fabric)), state


def same(a, b):
    """Whether two states hold the same tensors, bit for bit."""
    (left, facts), (right, other) = a.pack(), b.pack()
    return (
        facts == other
        and left.keys() == right.keys()
        and all(torch.equal(left[name], right[name]) for name in left)
    )


# ---- the loop


@pytest.mark.parametrize("recipe", [SMALL, IMAGES], ids=["mlp", "unet"])
def test_training_lowers_the_loss(recipe):
    recipe = dataclasses.replace(recipe, steps=60, schedule="constant", lr=3e-3)
    records, _ = train_to_the_end(recipe)
    assert [r.step for r in records] == list(range(1, 61))
    first, last = records[:10], records[-10:]
    assert sum(r.loss for r in last) < 0.8 * sum(r.loss for r in first)


def test_a_seed_repeats_a_run_and_another_does_not():
    (first, a), (_, b) = train_to_the_end(SMALL), train_to_the_end(SMALL)
    other, c = train_to_the_end(dataclasses.replace(SMALL, seed=1))
    assert same(a, b) and not same(a, c)
    assert first[0].loss != other[0].loss


def test_training_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    train_to_the_end(IMAGES)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path, dropout):
    options = {"channels": [8, 16], "dropout": dropout}
    recipe = dataclasses.replace(IMAGES, network_options=options)
    _, whole = train_to_the_end(recipe)
    dataset, state, fabric = begin(recipe)
    for record in training(recipe, dataset, state, fabric):
        if record.step == 5:
            manifest = checkpoint.write(tmp_path, state.step, *state.pack())
            break
    _, resumed, fabric = begin(recipe)
    resumed.unpack(*checkpoint.read(manifest))
    assert resumed.step == 5 and not same(whole, resumed)
    records = list(training(recipe, dataset, resumed, fabric))
    assert records[0].step == 6 and same(whole, resumed)


def test_without_the_optimizer_memory_resuming_differs(tmp_path):
    """The planted fault of the test above."""
    _, whole = train_to_the_end(SMALL)
    dataset, state, fabric = begin(SMALL)
    for record in training(SMALL, dataset, state, fabric):
        if record.step == 5:
            tensors, facts = state.pack()
            break
    _, resumed, fabric = begin(SMALL)
    kept = {name: t for name, t in tensors.items() if not name.startswith("optimizer.")}
    resumed.unpack(5, kept, facts)
    list(training(SMALL, dataset, resumed, fabric))
    assert not same(whole, resumed)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_never_enters_the_average(bad):
    dataset, state, fabric = begin(SMALL)
    steps = training(SMALL, dataset, state, fabric)
    for _ in range(3):
        next(steps)
    before = {name: t.clone() for name, t in state.pack()[0].items()}
    dataset.x[:] = bad
    with pytest.raises(NonFiniteError, match=r"step 4 has loss (nan|inf).*still those of step 3"):
        list(steps)
    assert state.step == 3
    after = state.pack()[0]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_gradients_are_clipped(monkeypatch):
    recipe = dataclasses.replace(SMALL, clip=1e-3, steps=1)
    dataset, state, fabric = begin(recipe)
    norms = []
    step = state.optimizer.step

    def spy(*args, **kwargs):
        gradients = [p.grad for p in state.network.parameters() if p.grad is not None]
        norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))
        return step(*args, **kwargs)

    monkeypatch.setattr(state.optimizer, "step", spy)
    (record,) = training(recipe, dataset, state, fabric)
    assert record.grad_norm > 0.1
    assert norms == [pytest.approx(1e-3, rel=1e-3)]


def test_the_average_forgets_its_start_and_then_decays_as_told():
    update = moving_average(0.9)
    average, weights = [torch.tensor([1.0])], [torch.tensor([0.0])]
    update(average, weights, torch.tensor(1))
    assert average[0].item() == pytest.approx(2 / 11)
    average[0].fill_(1.0)
    update(average, weights, torch.tensor(10_000))
    assert average[0].item() == pytest.approx(0.9)


def test_the_average_differs_from_the_weights_and_follows_them():
    _, state = train_to_the_end(SMALL)
    pairs = zip(state.network.parameters(), state.ema.module.parameters(), strict=True)
    gaps = [float((w - a).detach().abs().max()) for w, a in pairs]
    assert 0 < max(gaps) < 0.1


def test_learning_rates_rise_and_fall():
    recipe = dataclasses.replace(SMALL, steps=100, warmup=10, lr=1.0)
    rates = [learning_rate(recipe, k) for k in range(100)]
    assert rates[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert rates[10] == 1 and rates[55] == pytest.approx(0.5) and 0 < rates[99] < 1e-3
    assert learning_rate(dataclasses.replace(recipe, schedule="constant"), 99) == 1


def test_batches_see_every_sample_once_an_epoch_and_start_anywhere():
    recipe = dataclasses.replace(SMALL, batch_size=4, steps=5)
    batches = list(Batches(10, recipe, 0))
    row = [index for batch in batches for index in batch]
    assert sorted(row[:10]) == sorted(row[10:]) == list(range(10)) and row[:10] != row[10:]
    assert list(Batches(10, recipe, 3)) == batches[3:]
    assert list(Batches(10, dataclasses.replace(recipe, seed=1), 0)) != batches


def test_two_ranks_share_the_batches_of_one():
    recipe = dataclasses.replace(SMALL, batch_size=4, steps=5)
    halves = [list(Batches(10, recipe, 0, rank, 2)) for rank in (0, 1)]
    for batch, even, odd in zip(Batches(10, recipe, 0), *halves, strict=True):
        assert even == batch[::2] and odd == batch[1::2]


# ---- checkpoints


@pytest.fixture
def saved(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7)}
    return checkpoint.write(tmp_path, 3, tensors, {"note": "x"}), tensors


def test_a_checkpoint_comes_back(saved):
    manifest, tensors = saved
    step, found, facts = checkpoint.read(manifest)
    assert step == 3 and facts == {"note": "x"} and found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert not list(manifest.parent.glob(".*")), "a temporary file was left"


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_flipped_bit_is_found(saved, suffix, place):
    file = saved[0].with_suffix(suffix)
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 1
    file.write_bytes(data)
    with pytest.raises(checkpoint.CheckpointError, match="step_00000003.*(damaged|cannot be read)"):
        checkpoint.read(saved[0])


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_short_or_missing_file_is_found(saved, suffix):
    file = saved[0].with_suffix(suffix)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.read(saved[0])
    file.unlink()
    with pytest.raises(checkpoint.CheckpointError, match="cannot be read"):
        checkpoint.read(saved[0])


def test_a_crash_while_writing_leaves_the_old_checkpoint(saved, monkeypatch):
    def crash(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(saved[0].parent, 4, saved[1], {})
    assert checkpoint.latest(saved[0].parent) == saved[0]
    assert sorted(f.suffix for f in saved[0].parent.iterdir()) == [".json", ".safetensors"]


def test_only_the_last_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 10):
        checkpoint.write(tmp_path, step, {"a": torch.zeros(1)}, {})
    checkpoint.prune(tmp_path, keep=2)
    assert [m.stem for m in checkpoint.manifests(tmp_path)] == ["step_00000002", "step_00000010"]
    assert len(list(tmp_path.iterdir())) == 4


# ---- the recipe and the run folder


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"batch_size": True}, "batch_size=True"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"ema": 1.0}, "ema=1.0"),
        ({"seed": -1}, "seed=-1"),
        ({"times": "unifrom"}, "did you mean 'uniform'"),
        ({"weighting": "x"}, "weighting='x'"),
        ({"schedule": "linear"}, "cosine, constant|constant, cosine"),
    ],
)
def test_a_recipe_refuses_bad_values_by_name(options, words):
    with pytest.raises(ArgumentError, match=words):
        Recipe(**options)


def test_a_recipe_refuses_an_sde_without_a_kernel():
    with pytest.raises(ArgumentError, match="gbm.*no Gaussian kernel"):
        Recipe(sde="gbm").make_sde()


def test_options_are_checked_by_name_and_type():
    assert build("sde", "vp", {"beta_max": 15}).beta_max == 15
    with pytest.raises(ArgumentError, match="'beta_mx'; did you mean 'beta_max'"):
        build("sde", "vp", {"beta_mx": 15})
    with pytest.raises(ArgumentError, match="beta_max='high'"):
        build("sde", "vp", {"beta_max": "high"})
    with pytest.raises(ArgumentError, match="no option 'shape'"):
        build("network", "unet", {"shape": [1, 8, 8]}, shape=(1, 8, 8))
    grid = build("grid", "karras", {"rho": 3, "to_zero": True})
    assert grid(VP(), 5)[-1] == 0
    with pytest.raises(ArgumentError, match="'u'; there are: rho, t_max, t_min, to_zero"):
        build("grid", "karras", {"u": 3})


def test_a_recipe_survives_its_file(tmp_path):
    SMALL.save(tmp_path / "config.yaml")
    assert Recipe.load(tmp_path / "config.yaml") == SMALL
    (tmp_path / "config.yaml").write_text("stepps: 3\n")
    with pytest.raises(ArgumentError, match="'stepps'.*did you mean 'steps'"):
        Recipe.load(tmp_path / "config.yaml")


def test_a_run_folder_holds_all_that_belongs_to_it(tmp_path):
    run = train_run(tmp_path / "run", SMALL, quiet=True)
    found = {str(f.relative_to(run.path)) for f in run.path.rglob("*") if f.is_file()}
    steps = ("step_00000006", "step_00000012")
    assert found == {
        "config.yaml",
        "metrics.csv",
        "loss.png",
        *(f"samples/{step}.png" for step in steps),
        *(f"checkpoints/{step}.{end}" for step in steps for end in ("json", "safetensors")),
    }
    with run.metrics.open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [4, 8, 12]
    assert all(float(row["loss"]) > 0 for row in rows)


def test_an_interrupted_run_resumes_to_the_same_end(tmp_path):
    whole = train_run(tmp_path / "whole", SMALL, quiet=True)
    train_run(tmp_path / "part", dataclasses.replace(SMALL, steps=6, schedule="constant"))
    with pytest.raises(ArgumentError, match="schedule='constant'"):
        train_run(tmp_path / "part", SMALL, resume=True)
    constant = dataclasses.replace(SMALL, schedule="constant")
    part = train_run(tmp_path / "part", constant, resume=True, quiet=True)
    full = train_run(tmp_path / "full", constant, quiet=True)
    a, b = (checkpoint.read(checkpoint.latest(r.path / "checkpoints")) for r in (part, full))
    assert a[0] == b[0] == 12 and all(torch.equal(a[1][name], b[1][name]) for name in a[1])
    assert [r.step for r in part.read_metrics()][-1] == 12 == whole.read_metrics()[-1].step


def test_a_run_is_never_written_over(tmp_path):
    with pytest.raises(ArgumentError, match="holds no checkpoint"):
        train_run(tmp_path, SMALL, resume=True)
    train_run(tmp_path, SMALL, quiet=True)
    with pytest.raises(ArgumentError, match="holds checkpoints already.*--resume"):
        train_run(tmp_path, SMALL)
    with pytest.raises(ArgumentError, match="no config.yaml"):
        Run.open(tmp_path / "elsewhere")


def test_a_run_gives_back_its_averaged_network(tmp_path):
    run = train_run(tmp_path, SMALL, quiet=True)
    _, tensors, _ = checkpoint.read(checkpoint.latest(tmp_path / "checkpoints"))
    denoiser, shape = Run.open(tmp_path).denoiser()
    assert shape == (2,) and denoiser.sde == run.recipe.make_sde()
    for name, value in denoiser.net.state_dict().items():
        assert torch.equal(value, tensors[f"ema.{name}"])
    assert not denoiser.net.training
