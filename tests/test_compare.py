"""Samplers side by side: what is measured, kept, told apart and written."""

import json
import re

import pytest
import torch
from sdeflow_plugins.evaluate.bootstrap import Estimate, estimate, mean_of
from sdeflow_plugins.evaluate.compare import Cell, Store, compare, plans, tightened
from sdeflow_plugins.evaluate.comparison import compare_run
from sdeflow_plugins.evaluate.rows import named_samplers
from sdeflow_plugins.evaluate.verdict import tables, verdicts
from sdeflow_plugins.generate.sampler import Sampler
from sdeflow_plugins.train.recipe import Recipe
from sdeflow_plugins.train.session import train_run

from sdeflow import VP, ArgumentError, Denoiser, NonFiniteError
from sdeflow.cli import main


def ideal():
    """The exact denoiser of N(0, I/4) data under VP."""
    sde = VP()

    def data(x, t):
        a, s = sde.kernel(x, t)
        return a * 0.25 / (a**2 * 0.25 + s**2) * x

    return Denoiser(data, sde, "data")


def drawing(sampler, steps):
    solution = sampler.run(ideal(), (400, 2), steps, list(range(400)))
    return solution.x, solution.nfe


def spread(x):
    gap = abs(float(x.std()) - 0.5)
    return {"frechet_distance": Estimate(gap, 0.0, torch.zeros(2))}


# ---- cells


def test_compare_counts_evaluations_and_starts_all_from_the_same_noise():
    samplers = {
        "ddim": Sampler("ddim"),
        "heun": Sampler("heun"),
        "ddpm": Sampler("ddpm"),
        "dopri5": Sampler("torchdiffeq"),
    }
    results = list(compare(plans(samplers, [2, 40, 80]), drawing, spread))
    made = {(c.sampler, c.budget): c.evaluations for c, _ in results}
    assert made["ddim", 40] == made["heun", 40] == made["ddpm", 40] == 40
    assert made["dopri5", 2] >= 12, "an adaptive solver chooses its own steps"
    samples = {(c.sampler, c.budget): x for c, x in results}
    both = torch.stack((samples["heun", 80].flatten(), samples["dopri5", 80].flatten()))
    assert torch.corrcoef(both)[0, 1] > 0.99
    distances = {(c.sampler, c.budget): c.value("frechet_distance") for c, _ in results}
    assert distances["ddim", 80] < 0.2 * distances["ddim", 2]


def test_adaptive_samplers_get_a_tighter_tolerance_in_each_column():
    loose, tight = (tightened(Sampler("torchdiffeq"), column).make_solver() for column in (0, 3))
    assert loose.rtol == loose.atol > 100 * tight.rtol
    assert tightened(Sampler("torchdiffeq", {"rtol": 1e-7}), 0).make_solver().rtol == 1e-7


def test_the_process_of_a_sampler_follows_from_its_solver():
    assert Sampler("ddim").process(ideal()).eta == 0
    assert Sampler("ddpm").process(ideal()).eta == 1
    assert Sampler("ddim", eta=0.5).process(ideal()).eta == 0.5


def test_rows_are_solvers_solvers_on_a_grid_and_presets():
    samplers, fixed = named_samplers(["ddim", "unipc_2/angle", "edm_heun_18"])
    assert samplers["ddim"] == Sampler("ddim")
    assert samplers["unipc_2/angle"] == Sampler("unipc_2", grid="angle")
    assert samplers["edm_heun_18"].grid == "karras" and fixed == {"edm_heun_18": 18}
    placed = [(p.label, p.budget, p.steps) for p in plans(samplers, [10, 50], fixed)]
    assert placed == [
        ("ddim", 10, 10),
        ("ddim", 50, 50),
        ("unipc_2/angle", 10, 10),
        ("unipc_2/angle", 50, 50),
        ("edm_heun_18", 50, 18),
    ]
    with pytest.raises(ArgumentError, match="'edm_heun_18' makes up to 36 evaluations"):
        plans(samplers, [10, 20], fixed)
    with pytest.raises(ArgumentError, match="'dimm' is neither a preset nor a solver"):
        named_samplers(["dimm"])
    with pytest.raises(ArgumentError, match="'ddim/angel' is neither"):
        named_samplers(["ddim/angel"])


def test_a_run_that_blows_up_is_a_row_without_figures():
    def blown(sampler, steps):
        raise NonFiniteError("NaN at step 3")

    ((cell, x),) = compare(plans({"ddim": Sampler("ddim")}, [4]), blown, spread)
    assert x is None and cell.metrics == {} and cell.value("frechet_distance") == torch.inf
    assert "diverged" in tables([cell], ["frechet_distance"])
    assert "every run diverged" in verdicts([cell], "frechet_distance")


# ---- what is kept


class Counted:
    """A drawing that counts its calls, and stops the comparison at one of them."""

    def __init__(self, stop=0):
        self.calls, self.stop = 0, stop

    def __call__(self, sampler, steps):
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        return drawing(sampler, steps)


TODO = plans({"ddim": Sampler("ddim"), "heun": Sampler("heun")}, [4, 8])


def test_a_comparison_that_was_broken_off_goes_on(tmp_path):
    store, broken = Store(tmp_path / "cells", {"seeds": "0-399"}), Counted(stop=3)
    with pytest.raises(KeyboardInterrupt):
        list(compare(TODO, broken, spread, store))
    rest, whole = Counted(), list(compare(TODO, drawing, spread))
    resumed = list(compare(TODO, rest, spread, Store(tmp_path / "cells", {"seeds": "0-399"})))
    assert rest.calls == 2
    for (ours, x), (theirs, y) in zip(resumed, whole, strict=True):
        assert ours.value("frechet_distance") == theirs.value("frechet_distance")
        assert (ours.sampler, ours.evaluations) == (theirs.sampler, theirs.evaluations)
        assert torch.equal(x, y)


@pytest.mark.parametrize("spoil", ["settings", "options", "truncated", "samples"])
def test_what_changed_or_broke_is_measured_again(tmp_path, spoil):
    list(compare(TODO, drawing, spread, Store(tmp_path, {"weights": "a"})))
    todo, settings = TODO, {"weights": "b" if spoil == "settings" else "a"}
    store = Store(tmp_path, settings)
    file = tmp_path / f"{store.key(TODO[0])}.json"
    if spoil == "options":
        todo = plans({"ddim": Sampler("ddim", eta=0.5), "heun": Sampler("heun")}, [4, 8])
    elif spoil == "truncated":
        file.write_text(file.read_text()[:100])
    elif spoil == "samples":
        file.with_suffix(".npy").unlink()
    again, once_more = Counted(), Counted()
    list(compare(todo, again, spread, store))
    assert again.calls == {"settings": 4, "options": 2}.get(spoil, 1)
    list(compare(todo, once_more, spread, store))
    assert once_more.calls == 0


# ---- the verdict


def cell(name, values, budget=10):
    return Cell(name, budget, budget, 0.1, {"recall": estimate(mean_of(values), len(values))})


def test_the_verdict_tells_apart_what_is_beyond_the_paired_error():
    """b differs from a by a hundredth of its error bar, but the same on all samples: told apart."""
    noise = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    jitter = torch.randn(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    jitter -= jitter.mean()
    a, b, c = cell("a", noise), cell("b", noise - 0.01), cell("c", noise + 0.3 * jitter - 0.001)
    text = verdicts([b, a, c], "recall")
    a_error = a.metrics["recall"].error
    assert a_error > 0.03 and "a is best" in text
    assert re.search(r"not told apart from it: c \(\+\S+ ± 0\.01\d\)", text)
    assert re.search(r"behind: b \(\+0\.01 ± \S+\)", text)
    flipped = verdicts([cell("low", noise), cell("high", noise + 1)], "recall")
    assert "high is best" in flipped and "behind: low" in flipped


# ---- on a run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    recipe = Recipe(
        data="moons",
        data_options={"n": 300},
        network="mlp",
        network_options={"width": 16, "depth": 1},
        conditional=True,
        steps=2,
        warmup=1,
        batch_size=16,
    )
    return train_run(tmp_path_factory.mktemp("runs") / "moons", recipe, quiet=True)


def test_compare_run_writes_tables_and_pictures_and_does_nothing_twice(run, capsys, monkeypatch):
    options = ["--solvers", "[ddim, unipc_2/angle]", "--budgets", "[4, 8]", "--n", "60"]
    command = ["compare", str(run.path), *options, "--guidance", "1.5", "--replicates", "20"]
    assert main(command) == 0
    first = capsys.readouterr().out
    for words in ("sliced Wasserstein distance", "class as asked", "<= 8 evaluations", "is best"):
        assert words in first
    rows = (run.path / "comparison.csv").read_text().splitlines()
    assert rows[0].startswith("sampler,budget,evaluations,seconds,sliced_wasserstein,")
    assert len(rows) == 5
    assert all(
        (run.path / name).stat().st_size > 500 for name in ("comparison.png", "distance.png")
    )
    kept = [json.loads(file.read_text()) for file in (run.path / "comparison").glob("*.json")]
    assert {k["seeds"] for k in kept} == {"0-59"} and {k["guidance"] for k in kept} == {1.5}

    def never(*args, **kwargs):
        raise AssertionError("drawn again")

    monkeypatch.setattr(Sampler, "run", never)
    assert main(command) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--metrics", "[fid]"], "must be some of frechet_distance"),
        (["--n", "3"], "n=3 must be at least 6"),
        (["--solvers", "[heun]", "--budgets", "[1]"], "below one step of every solver"),
        (["--solvers", "[]"], "solvers=[] is empty"),
        (["--features", "judge"], "needs labelled images"),
    ],
)
def test_compare_refuses_what_cannot_be_measured(run, capsys, options, words):
    assert main(["compare", str(run.path), *options]) == 2
    assert words in capsys.readouterr().err


def test_cells_depend_on_the_weights(run, tmp_path):
    """Two runs in one folder of cells would share none: the key holds the hash of the weights."""
    samplers = {"ddim": Sampler("ddim")}
    compare_run(run, samplers, [4], 20)
    before = set((run.path / "comparison").glob("*.json"))
    further = Recipe(**{**vars(run.recipe), "steps": 3})
    train_run(run.path, further, resume=True, quiet=True)
    compare_run(type(run).open(run.path), samplers, [4], 20)
    assert len(set((run.path / "comparison").glob("*.json")) - before) == 1
