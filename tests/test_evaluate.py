"""How good are generated samples: the judge, the panel of metrics, and `sdeflow evaluate`."""

import json

import numpy as np
import pytest
import torch
from sdeflow_plugins.data import TensorData
from sdeflow_plugins.evaluate.bootstrap import Estimate
from sdeflow_plugins.evaluate.distances import gaussian_like
from sdeflow_plugins.evaluate.draw import balanced, draw
from sdeflow_plugins.evaluate.judge import accuracy, train_judge, train_state_judge
from sdeflow_plugins.evaluate.panel import METRICS, Panel
from sdeflow_plugins.evaluate.quality import assess
from sdeflow_plugins.evaluate.real import batches, selection, whole
from sdeflow_plugins.evaluate.report import aligned, number, seed_range
from sdeflow_plugins.generate.sampler import Sampler
from sdeflow_plugins.generate.shards import parse_seeds
from sdeflow_plugins.train.recipe import Recipe
from sdeflow_plugins.train.session import train_run
from torch.utils.data import Dataset

from sdeflow import ArgumentError, NonFiniteError, ShapeError, get
from sdeflow.cli import main

# ---- the judge


@pytest.fixture(scope="module")
def judged():
    train, test = get("dataset", "digits"), get("dataset", "digits", split="test")
    return train_judge(train, epochs=8), train, test


def test_the_judge_knows_held_out_digits_and_is_repeatable(judged):
    judge, train, test = judged
    assert judge.accuracy(test) > 0.95
    again = train_judge(get("dataset", "digits", only=(0, 1)), epochs=1)
    other = train_judge(get("dataset", "digits", only=(0, 1)), epochs=1)
    assert torch.equal(again(test.x), other(test.x))


def test_states_that_are_no_images_have_a_judge_too():
    train, test = (get("dataset", "moons", split=s, n=400) for s in ("train", "test"))
    assert accuracy(train_state_judge(train), test) > 0.95
    with pytest.raises(ArgumentError, match="no images"):
        train_judge(train)
    with pytest.raises(ArgumentError, match="no labels"):
        train_state_judge(TensorData(train.x))


def test_quality_accepts_real_digits_and_rejects_a_gaussian_and_a_collapse(judged):
    judge, train, test = judged
    real = assess(judge, train.x, train, test)
    assert real.distance == real.distance_real and real.sure > 0.95 and real.rarest > 0.08
    gaussian = assess(judge, gaussian_like(train.x, 1000), train, test)
    assert not gaussian.passed and gaussian.distance > 3 * gaussian.distance_real
    collapsed = assess(judge, train.x[train.labels == 3], train, test)
    assert not collapsed.passed and collapsed.rarest == 0 and "missed" in str(collapsed)


# ---- real data


class Slow(Dataset):
    """Samples one at a time, as a folder gives them."""

    def __init__(self, x):
        self.x, self.shape = x, tuple(x.shape[1:])

    def __len__(self):
        return len(self.x)

    def __getitem__(self, k):
        return self.x[k]


def test_a_selection_of_real_data_is_fixed_spread_out_and_the_same_for_every_kind_of_data():
    x = torch.arange(2000.0)[:, None]
    found = whole(TensorData(x), 100)
    assert torch.equal(found, whole(Slow(x), 100)) and len(found.unique()) == 100
    assert float(found.min()) < 100 and float(found.max()) > 1900
    assert torch.equal(selection(50, 100), torch.arange(50))
    assert torch.equal(torch.cat(list(batches(Slow(x)))), x)


# ---- the panel


@pytest.fixture(scope="module")
def digits_panel(judged):
    judge, train, test = judged
    return Panel(train, test, judge=judge), train, test


def test_a_faulty_model_is_worse_by_the_metric_that_looks_for_its_fault(digits_panel):
    """Each planted fault moves its metric beyond five error bars of what real data measure."""
    panel, train, test = digits_panel
    real = panel.floor(450, replicates=50).metrics
    faults = {
        ("frechet_distance", "kernel_distance", "precision", "density"): (
            gaussian_like(train.x, 1000)
        ),
        ("sliced_wasserstein",): 0.7 * train.x[:450],
        ("recall", "coverage"): train.x[train.labels == 3],
        ("nearer", "memorised"): train.x[:450],
        ("accuracy",): test.x.flip(3),
    }
    for names, x in faults.items():
        asked = test.labels if "accuracy" in names else None
        found = panel.measure(x, asked, replicates=50).metrics
        for name in names:
            sign = 1 if METRICS[name].better in ("low", "half") else -1
            gap = sign * (found[name].value - real[name].value)
            assert gap > 5 * max(real[name].error, found[name].error), name
    copies = panel.measure(train.x[:450], train.labels[:450], replicates=2).metrics
    assert copies["memorised"].value == 1 and copies["nearer"].value > 0.99


def test_real_data_measure_as_new_draws_of_their_law_do(digits_panel):
    panel, train, test = digits_panel
    measured = panel.floor(1000, replicates=50)
    real = measured.metrics
    assert set(real) == set(METRICS)
    assert real["nearer"].value == pytest.approx(0.5, abs=1e-6)  # held-out against themselves
    assert real["accuracy"].value == pytest.approx(panel.judge_accuracy)
    assert set(measured.per_class) == set("0123456789")
    assert real["precision"].value > 0.85 and real["recall"].value > 0.85
    assert abs(real["kernel_distance"].value) < 5 * real["kernel_distance"].error + 5
    assert all(real[name].error > 0 for name in METRICS if name.endswith(("distance", "ein")))


def test_what_does_not_apply_is_left_out_with_its_reason():
    train, test = (get("dataset", "swiss_roll", split=s, n=60) for s in ("train", "test"))
    panel = Panel(train, test)
    assert panel.features.name == "state" and "no labels" in panel.left_out["accuracy"]
    found = panel.measure(train.x, replicates=5).metrics
    assert set(found) == set(METRICS) - {"accuracy"}
    images = TensorData(torch.randn(20, 3, 4, 4))
    assert "pixels" in Panel(images, images, wanted=["recall"]).notes[0]
    wide = TensorData(torch.randn(20, 5000))
    panel = Panel(wide, wide)
    assert "5000 features" in panel.left_out["frechet_distance"]
    assert "frechet_distance" not in panel.measure(wide.x, replicates=2).metrics


def test_samples_that_cannot_be_measured_are_refused():
    data = TensorData(torch.randn(30, 2), torch.arange(30) % 3)
    panel = Panel(data, data)
    with pytest.raises(ShapeError, match=r"must be \(n, 2\)"):
        panel.measure(torch.randn(30, 3))
    with pytest.raises(ArgumentError, match="too few"):
        panel.measure(data.x[:3])
    with pytest.raises(NonFiniteError, match="2 of 30 samples"):
        panel.measure(data.x.clone().index_fill_(0, torch.tensor([3, 7]), torch.nan))
    with pytest.raises(ArgumentError, match="holds out 3"):
        Panel(data, TensorData(data.x[:3]))


# ---- the report


def test_numbers_have_the_places_of_their_error_bar():
    def said(value, error):
        return number(Estimate(value, error, torch.zeros(2)))

    assert said(1.23456, 0.0512) == "1.235 ± 0.051"
    assert said(123.456, 12.3) == "123 ± 12"
    assert said(58624985053.0, 1.156e10) == "5.86e+10 ± 1.2e+10"
    assert said(0.98, 0.0) == "0.98" and said(float("inf"), 0.1) == "diverged"
    assert aligned([["", "one"], ["name", "2"]]) == "       one\nname     2"


@pytest.mark.parametrize("seeds", [[0], [0, 1, 2], [7, 7, 8], [0, 1, 5, 6, 7, 20]])
def test_the_seed_list_in_a_report_reads_back(seeds):
    assert parse_seeds(seed_range(seeds)) == seeds


# ---- on a run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A conditional run on the digits 3 and 8, hardly trained."""
    recipe = Recipe(
        data_options={"only": [3, 8]},
        network_options={"channels": [8, 16]},
        conditional=True,
        steps=2,
        warmup=1,
        batch_size=16,
    )
    return train_run(tmp_path_factory.mktemp("runs") / "digits", recipe, quiet=True)


def test_a_sample_depends_on_its_seed_and_class_alone(run):
    denoiser, shape = run.denoiser()
    labels = balanced(7, run.dataset())
    assert labels.tolist() == [3, 8, 3, 8, 3, 8, 3]
    whole = draw(denoiser, shape, Sampler(), 3, range(7), labels, 2.0)
    parts = draw(denoiser, shape, Sampler(), 3, range(7), labels, 2.0, batch=3)
    torch.testing.assert_close(whole.x, parts.x, atol=1e-5, rtol=0)
    assert whole.evaluations == 3
    free = draw(denoiser, shape, Sampler(), 3, range(7), labels, 0.0)
    other = draw(denoiser, shape, Sampler(), 3, range(7), labels.roll(1), 0.0)
    assert torch.equal(free.x, other.x)


def test_evaluate_writes_figures_error_bars_seeds_and_pictures(run, capsys):
    options = ["--seeds", "0-39", "--steps", "3", "--guidance", "[1, 2]", "--replicates", "20"]
    assert main(["evaluate", str(run.path), *options]) == 0
    out = capsys.readouterr().out
    assert "a share of exactly 0 or 1" in out and "within 7.50% of it" in out
    assert "guidance 1" in out and "real data" in out and "class as asked" in out
    found = json.loads((run.path / "evaluation.json").read_text())
    assert [c["name"] for c in found["columns"]] == ["guidance 1", "guidance 2"]
    for column in found["columns"]:
        assert column["seeds"] == "0-39" and column["samples"] == 40 and column["evaluations"] == 3
        assert set(column["metrics"]) == set(METRICS)
        assert set(column["per_class"]) == {"3", "8"}
        assert all(m["error"] is not None for m in column["metrics"].values())
    assert found["features"]["name"] == "judge" and found["versions"]["torch"] == torch.__version__
    assert found["judge_accuracy"] > 0.9 and found["error_bars"]["replicates"] == 20
    for name in ("evaluation_guidance_1.png", "evaluation_guidance_2_nearest.png"):
        assert (run.path / name).stat().st_size > 1000
    first = (run.path / "evaluation.json").read_bytes()
    assert main(["evaluate", str(run.path), *options]) == 0
    assert (run.path / "evaluation.json").read_bytes() == first


def test_given_samples_are_judged_instead(run, tmp_path, capsys):
    test = run.dataset("test")
    np.save(tmp_path / "x.npy", test.x.numpy())
    np.save(tmp_path / "y.npy", test.labels.numpy())
    options = ["--samples", str(tmp_path / "x.npy"), "--labels", str(tmp_path / "y.npy")]
    out = ["--out", str(tmp_path / "found.json"), "--replicates", "5"]
    assert main(["evaluate", str(run.path), *options, *out]) == 0
    (column,) = json.loads((tmp_path / "found.json").read_text())["columns"]
    assert column["file"] == "x.npy" and column["samples"] == len(test)
    assert column["metrics"]["precision"]["value"] == 1
    assert column["metrics"]["frechet_distance"]["value"] == pytest.approx(0, abs=1e-4)
    assert column["metrics"]["accuracy"]["value"] > 0.9 and set(column["per_class"]) == {"3", "8"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--labels", "y.npy"], "give --samples too"),
        (["--samples", "x.png"], "must be a .npy or a .safetensors file"),
        (["--samples", "absent.npy"], "cannot be read"),
        (["--seeds", "9-0"], "runs backwards"),
        (["--preset", "unipc_10", "--steps", "4"], "sets the solver"),
        (["--features", "inception"], "module:object or file.py:object"),
        (["--feature_weights", "w.safetensors"], "takes no options and no weights"),
        (["--solver", "dimm"], "dimm"),
        (["--steps", "0"], "steps=0 must be at least 1"),
        (["--replicates", "1"], "replicates"),
    ],
)
def test_evaluate_refuses_in_one_line(run, capsys, options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(run.path), *options]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_several_processes_are_told_what_to_do_instead(run, command, monkeypatch, capsys):
    told = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    for name, value in (told | {"LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"}).items():
        monkeypatch.setenv(name, value)
    assert main([command, str(run.path)]) == 2
    assert "runs in one process, not in 2" in capsys.readouterr().err


def test_guidance_of_an_unconditional_run_is_refused(tmp_path, capsys):
    mlp = {"width": 8, "depth": 1}
    recipe = Recipe(data="moons", network="mlp", network_options=mlp, steps=1, batch_size=8)
    train_run(tmp_path / "moons", recipe, quiet=True)
    assert main(["evaluate", str(tmp_path / "moons"), "--guidance", "[2]"]) == 2
    assert "the run is unconditional" in capsys.readouterr().err
