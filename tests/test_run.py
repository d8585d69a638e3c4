"""The run folder: what a run leaves there, how it goes on, and how it is stopped."""

import csv
import dataclasses
import json
import os
import signal
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sdeflow_plugins.train import checkpoint, session
from sdeflow_plugins.train.checkpoint import CheckpointError
from sdeflow_plugins.train.command import train
from sdeflow_plugins.train.engine import make_fabric
from sdeflow_plugins.train.lock import LockedError, locked
from sdeflow_plugins.train.loop import Record, training
from sdeflow_plugins.train.recipe import Recipe
from sdeflow_plugins.train.run import Run, misfits
from sdeflow_plugins.train.session import Progress, smoothed, train_run
from sdeflow_plugins.train.signals import Signals
from sdeflow_plugins.train.state import State

from sdeflow import ArgumentError, NonFiniteError, cli
from sdeflow.plugins import UnknownNameError

TINY = Recipe(
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
    preview_every=1000,  # at the end alone
)


def change(**options):
    return dataclasses.replace(TINY, **options)


def last(run):
    """The tensors of a run's last checkpoint."""
    manifest, complaints = checkpoint.newest_valid(run.checkpoints)
    assert complaints == []
    return checkpoint.read(manifest)[1]


def same(a, b):
    """Whether two runs ended alike: weights, averages, optimizer and metrics, bit for bit."""
    left, right = last(a), last(b)
    return (
        left.keys() == right.keys()
        and all(torch.equal(left[name], right[name]) for name in left)
        and a.metrics.read_bytes() == b.metrics.read_bytes()
    )


def opened(path):
    """A picture's pixels."""
    with Image.open(path) as image:
        return np.asarray(image)


def until(monkeypatch, step, act):
    """Let `act` happen right after a step of training."""

    def loop(*args, **options):
        for record in training(*args, **options):
            if record.step == step:
                act()
            yield record

    monkeypatch.setattr(session, "training", loop)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that was never stopped."""
    return train_run(tmp_path_factory.mktemp("whole"), TINY, quiet=True)


# ---- what it leaves


def test_a_run_folder_holds_all_that_belongs_to_it(tmp_path, capsys):
    run = train_run(tmp_path / "run", change(preview_every=0), quiet=True)
    found = {str(f.relative_to(run.path)) for f in run.path.rglob("*") if f.is_file()}
    steps = ("step_00000006", "step_00000012")
    assert found == {
        ".lock",
        "README.md",
        "config.yaml",
        "metrics.csv",
        "loss.png",
        "checkpoints/best.json",
        *(f"samples/{step}.png" for step in steps),
        *(f"checkpoints/{step}.{end}" for step in steps for end in ("json", "safetensors")),
    }
    with run.metrics.open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [4, 8, 12]
    assert all(float(row["loss"]) > 0 for row in rows)
    assert capsys.readouterr() == ("", "")


def test_the_bar_shows_loss_speed_and_the_time_that_is_left(tmp_path, capsys):
    train_run(tmp_path, TINY)
    out, err = capsys.readouterr()
    assert "sdeflow sample" in out and "12/12" in err
    assert "loss=" in err and "samples/s" in err and "<00:00" in err


def test_the_card_says_what_was_trained_and_its_lines_run(tmp_path):
    recipe = change(conditional=True, sde="vp", sde_options={"beta_max": 15.0})
    run = train_run(tmp_path / "run", recipe, quiet=True)
    text = (run.path / "README.md").read_text()
    for words in (
        "`moons` (n=256): 256 samples of shape (2,)",
        "2 (lower, upper), label dropout 0.1",
        "`vp` (beta_max=15.0)",
        "12 steps of 32 samples",
        "1 process, fp32 on cpu",
        f"torch {torch.__version__}",
        f"sdeflow sample {run.path} --n 64",
        "--class 0 --guidance",
        "To be filled in",
    ):
        assert words in text
    names = {}
    exec(
        "\n".join(ln[4:] for ln in text.split("In Python:")[1].split("To train")[0].split("\n")),
        names,
    )
    assert names["x"].shape == (16, 2) and names["x"].isfinite().all()


@pytest.mark.parametrize("edit", ["mine", "a line", ""])
def test_a_card_that_the_user_has_changed_is_not_lost(tmp_path, edit):
    """One that nobody has changed gives way to the new one, and leaves nothing behind."""
    train_run(tmp_path, TINY, quiet=True)
    card, aside = tmp_path / "README.md", tmp_path / "README.md.1"
    changed = "mine" if edit == "mine" else edit + card.read_text()
    card.write_text(changed)
    train_run(tmp_path, change(steps=13), resume=True, quiet=True)
    assert aside.exists() == bool(edit) and (not edit or aside.read_text() == changed)
    assert "13 steps" in card.read_text()


def test_a_conditional_picture_has_a_row_for_each_class(tmp_path):
    recipe = change(
        data="digits",
        data_options={},
        conditional=True,
        network="unet",
        network_options={"channels": [8, 16]},
        steps=2,
        preview_every=1,
    )
    run = train_run(tmp_path, recipe, quiet=True)
    one, two = (opened(path) for path in sorted((run.path / "samples").iterdir()))
    height, width, _ = one.shape
    assert one.shape == two.shape and 10 * 56 < height < 10 * 80 and 8 * 56 < width < 8 * 80
    assert run.class_names == [str(k) for k in range(10)] and run.ink


def test_pictures_come_from_the_same_noise(tmp_path, whole):
    again = train_run(tmp_path, TINY, quiet=True)
    name = "samples/step_00000012.png"
    assert (opened(again.path / name) == opened(whole.path / name)).all()


def test_tensorboard_gets_scalars_and_samples(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train_run(tmp_path, change(tensorboard=True), quiet=True)
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert {"loss", "grad_norm", "lr", "samples_per_second"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Images("samples")] == [12]
    losses = [event.value for event in events.Scalars("loss")]
    assert losses == pytest.approx([record.loss for record in run.read_metrics()])


def test_without_tensorboard_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ArgumentError, match=r"pip install 'sdeflow\[tensorboard\]'"):
        train_run(tmp_path / "run", change(tensorboard=True))
    assert not (tmp_path / "run").exists()


# ---- the best checkpoint


def test_the_best_checkpoint_is_that_of_the_lowest_smoothed_loss_and_is_kept(tmp_path):
    state = State.fresh(TINY, (2,), torch.device("cpu"))
    optimizer = state.optimizer
    run, progress = Run.create(tmp_path, change(keep=1)), Progress()
    for step, loss in enumerate([3.0, 1.0, 2.0, 4.0, 5.0], 1):
        sum(p.sum() for p in state.network.parameters()).backward()
        optimizer.step()
        state.ema.module.load_state_dict(state.network.state_dict())
        state.step = step
        progress.records.append(Record(step, loss, 1.0, 1e-3))
        run.save(state, progress.facts(step))
    losses = [smoothed(progress.records[: n + 1]) for n in range(5)]
    assert losses.index(min(losses)) == 1
    assert [checkpoint.step_of(m) for m in checkpoint.manifests(run.checkpoints)] == [2, 5]
    told = json.loads((run.checkpoints / "best.json").read_text())
    assert told["manifest"] == "step_00000002.json" and told["loss"] == losses[1]
    weights = checkpoint.read(run.checkpoints / told["manifest"])[1]
    best, end = (run.network(best=which).state_dict() for which in (True, False))
    assert all(torch.equal(best[name], weights[f"ema.{name}"]) for name in best)
    assert not all(torch.equal(end[name], best[name]) for name in best)


def test_the_smoothed_loss_of_equal_losses_is_that_loss():
    records = [Record(step, 0.25, 1.0, 1e-3) for step in range(7)]
    assert smoothed(records) == pytest.approx(0.25)
    assert smoothed([*records, Record(8, 1.25, 1.0, 1e-3)]) == pytest.approx(
        0.25 + 1 / sum(0.9**k for k in range(8))
    )


# ---- going on


@pytest.mark.parametrize("stop", [3, 4, 6, 7, 11])
def test_a_stopped_run_resumes_to_the_same_end_bit_for_bit(tmp_path, monkeypatch, whole, stop):
    with monkeypatch.context() as patch:
        until(patch, stop, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train_run(tmp_path, TINY, quiet=True)
    manifest, _ = checkpoint.newest_valid(tmp_path / "checkpoints")
    assert checkpoint.step_of(manifest) == stop
    assert same(train_run(tmp_path, TINY, resume=True, quiet=True), whole)


def test_without_the_open_window_the_metrics_differ(tmp_path, monkeypatch, whole):
    """The planted fault of the test above: a log interval that spans the stop."""
    with monkeypatch.context() as patch:
        until(patch, 7, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train_run(tmp_path, TINY, quiet=True)
    resume = Progress.resume
    monkeypatch.setattr(
        Progress, "resume", lambda self, run, step, facts: resume(self, run, step, {})
    )
    run = train_run(tmp_path, TINY, resume=True, quiet=True)
    assert run.metrics.read_bytes() != whole.metrics.read_bytes()


def test_resume_auto_begins_where_there_is_nothing_and_else_goes_on(tmp_path, whole):
    run = train_run(tmp_path, change(steps=6), resume="auto", quiet=True)
    assert not run.resumes
    run = train_run(tmp_path, change(steps=8), resume="auto", quiet=True)
    assert run.resumes and [r.step for r in run.read_metrics()] == [4, 6, 8]


def test_resume_on_the_command_line_stands_alone_or_takes_auto():
    for words, parsed in (
        (["--resume", "runs/x"], ["--resume", "true", "runs/x"]),
        (["runs/x", "--resume"], ["runs/x", "--resume", "true"]),
        (["--resume", "auto", "runs/x"], ["--resume", "auto", "runs/x"]),
        (["--resume", "false", "runs/x"], ["--resume", "false", "runs/x"]),
        (["--allow_changes", "auto"], ["--allow_changes", "true", "auto"]),
    ):
        assert cli._with_flags(["train", *words], {"train": train}) == ["train", *parsed]


def test_a_run_is_never_written_over(tmp_path, whole):
    with pytest.raises(ArgumentError, match="holds no checkpoint.*--resume auto"):
        train_run(tmp_path / "new", TINY, resume=True)
    assert not (tmp_path / "new").exists()
    before = {f: f.read_bytes() for f in whole.path.rglob("*") if f.is_file()}
    with pytest.raises(ArgumentError, match="holds checkpoints already.*--resume"):
        train_run(whole.path, TINY)
    assert before == {f: f.read_bytes() for f in whole.path.rglob("*") if f.is_file()}
    with pytest.raises(ArgumentError, match="no config.yaml"):
        Run.open(tmp_path / "elsewhere")


def test_a_changed_recipe_shows_the_differences_and_stops_unless_told(tmp_path, capsys):
    run = train_run(tmp_path, TINY, quiet=True)
    other = change(schedule="constant", lr=1e-3, steps=16)
    with pytest.raises(ArgumentError) as caught:
        train_run(tmp_path, other, resume=True, quiet=True)
    assert "\n  lr: 0.002 -> 0.001\n" in str(caught.value)
    assert "\n  schedule: 'cosine' -> 'constant'\n" in str(caught.value)
    assert "steps:" not in str(caught.value) and "--allow_changes" in str(caught.value)
    assert Run.open(tmp_path).recipe == TINY
    train_run(tmp_path, other, resume=True, quiet=True, allow_changes=True)
    assert "lr: 0.002 -> 0.001" in (err := capsys.readouterr().err) and "steps: 12 -> 16" in err
    assert Run.open(tmp_path).recipe == other
    assert Recipe.load(tmp_path / "config.yaml.1") == TINY
    assert run.read_metrics()[-1].lr == 1e-3


def test_a_change_that_does_not_fit_the_weights_names_every_tensor(tmp_path):
    train_run(tmp_path, TINY, quiet=True)
    wider = change(network_options={"width": 24, "depth": 2}, steps=20)
    with pytest.raises(CheckpointError) as caught:
        train_run(tmp_path, wider, resume=True, allow_changes=True, quiet=True)
    text = str(caught.value)
    old, new = (State.fresh(recipe, (2,), torch.device("cpu")) for recipe in (TINY, wider))
    lines = checkpoint.differences(checkpoint.table(new.pack()[0]), checkpoint.table(old.pack()[0]))
    assert all(line in text for line in lines) and len(lines) > 10
    for words in ("missing: network.", "missing: ema.", "is float32 (16, 2), expected float32 (24"):
        assert words in text
    assert "step_00000012" in text and "step_00000006" in text
    assert Run.open(tmp_path).recipe == TINY and not (tmp_path / "config.yaml.1").exists()


def test_every_tensor_that_does_not_fit_a_state_is_named(whole):
    state, tensors = State.fresh(TINY, (2,), torch.device("cpu")), last(whole)
    assert misfits(state, tensors) == []
    bias = next(n for n, p in state.network.named_parameters() if p.shape == (2,))
    del tensors[f"ema.{bias}"], tensors["optimizer.3.exp_avg"]
    tensors[f"network.{bias}"] = tensors[f"network.{bias}"].double()
    tensors["optimizer.0.exp_avg"] = torch.zeros(5)
    tensors["optimizer.99.exp_avg"] = torch.zeros(5)
    tensors["more"] = torch.zeros(1)
    assert {line.split(" (")[0] for line in misfits(state, tensors)} == {
        f"missing: ema.{bias}",
        "unexpected: more",
        f"network.{bias} is float64",
        "optimizer.0.exp_avg is",
        "unexpected: optimizer.99.exp_avg",
        "missing: optimizer.3.exp_avg",
        "missing: optimizer.99.exp_avg_sq",
        "missing: optimizer.99.step",
    }
    bare = {name: t for name, t in tensors.items() if not name.startswith("optimizer.")}
    assert any("optimizer's memory" in line for line in misfits(state, bare))


def test_a_damaged_checkpoint_is_passed_over_named_and_set_aside(
    tmp_path, monkeypatch, whole, capsys
):
    with monkeypatch.context() as patch:
        until(patch, 8, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train_run(tmp_path, TINY, quiet=True)
    bad = tmp_path / "checkpoints" / "step_00000008.safetensors"
    bad.write_bytes(bad.read_bytes()[:-1])
    capsys.readouterr()
    Run.open(tmp_path).denoiser()
    err = capsys.readouterr().err
    assert "step_00000008.safetensors has sha256" in err and "step_00000006.json is used" in err
    assert bad.exists()
    run = train_run(tmp_path, TINY, resume=True, quiet=True)
    err = capsys.readouterr().err
    assert "step_00000008.safetensors has sha256" in err and "step_00000006.json is used" in err
    assert not bad.exists() and bad.with_name(bad.name + ".damaged").exists()
    assert same(run, whole)


def test_with_no_whole_checkpoint_resume_auto_does_not_begin_anew(tmp_path):
    run = train_run(tmp_path, change(steps=6), quiet=True)
    (manifest,) = checkpoint.manifests(run.checkpoints)
    manifest.write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoint that can be used"):
        train_run(tmp_path, TINY, resume="auto", quiet=True)
    assert manifest.read_text() == "{}"


def test_a_torn_last_line_of_the_metrics_is_left_out_and_a_bad_one_named(tmp_path, whole):
    run = Run(tmp_path, TINY)
    run.metrics.write_bytes(whole.metrics.read_bytes() + b"16,0.5,1.0,0.00")
    assert [record.step for record in run.read_metrics()] == [4, 8, 12]
    run.metrics.write_text("step,loss,grad_norm,lr\n4,0.5,1.0,1e-3\n8,much,1.0,1e-3\n")
    with pytest.raises(ArgumentError, match="line 3 is '8,much"):
        run.read_metrics()


def test_the_loop_is_a_generator_for_a_body_of_ones_own(tmp_path, whole):
    """The pattern in the docstring of train_run."""
    for _ in range(3):
        dataset, fabric = TINY.make_dataset(), make_fabric(TINY)
        state = State.fresh(TINY, dataset.shape, fabric.device, TINY.count_classes(dataset))
        run = Run.create(tmp_path, TINY, resume="auto")
        if run.resumes:
            run.load(state)
        for record in training(TINY, dataset, state, fabric):
            if record.step % 4 == 0:
                run.save(state)
                break
    a, b = last(run), last(whole)
    assert state.step == 12 and all(torch.equal(a[name], b[name]) for name in b)


# ---- one at a time, and the end


def test_a_second_process_in_the_folder_is_refused(tmp_path):
    with locked(tmp_path), pytest.raises(LockedError, match="is being trained by another process"):
        train_run(tmp_path, TINY, quiet=True)
    assert {f.name for f in tmp_path.iterdir()} == {".lock"}
    train_run(tmp_path, change(steps=1), quiet=True)


def command(path, *options):
    """`sdeflow train` on a tiny run; its exit status."""
    TINY.save(path / "tiny.yaml")
    argv = ["train", path / "run", "--config", path / "tiny.yaml", *options]
    try:
        return cli.main([str(word) for word in argv])
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_ends_the_command_after_the_step_with_a_checkpoint(
    tmp_path, monkeypatch, whole, number, capfd
):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        until(patch, 5, lambda: os.kill(os.getpid(), number))
        assert command(tmp_path) == 128 + number
    out, err = capfd.readouterr()
    assert "stopped at step 5, with a checkpoint" in out and "--resume" in out
    assert "finishing the step" in err
    assert signal.getsignal(number) is before
    assert command(tmp_path, "--resume") == 0
    assert same(Run.open(tmp_path / "run"), whole)


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    until(monkeypatch, 8, twice)
    assert command(tmp_path) == 130
    manifest, _ = checkpoint.newest_valid(tmp_path / "run" / "checkpoints")
    assert checkpoint.step_of(manifest) == 6
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python >= 3.12
def test_all_ranks_stop_at_the_same_step(tmp_path):
    ranks = [os.fork() or rank_that_stops(tmp_path, rank) for rank in (0, 1)]
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ranks]
    assert ends == [100 + 3, 100 + 3]


def rank_that_stops(folder, rank):
    """One of two processes; the second gets a signal in step 3. Its status: 100 + its last step."""
    try:
        meeting = f"file://{folder / 'meeting'}"
        torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=2)
        with Signals(SimpleNamespace(world_size=2)) as signals:
            for step in range(1, 10):
                if rank == 1 and step == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                if signals.stop():
                    break
        os._exit(100 + step if signals.caught == signal.SIGTERM else 1)
    finally:
        os._exit(2)


def test_in_another_thread_a_run_trains_without_handlers(tmp_path, whole):
    thread = threading.Thread(target=train_run, args=(tmp_path, TINY), kwargs={"quiet": True})
    thread.start()
    thread.join()
    assert same(Run.open(tmp_path), whole)


def test_a_loss_that_is_not_finite_ends_with_status_2_and_the_last_good_checkpoint(
    tmp_path, capsys
):
    options = ["--lr", "1e12", "--clip", "1e30", "--warmup", "10", "--schedule", "constant"]
    assert command(tmp_path, *options, "--save_every", "1", "--log_every", "1") == 2
    err = capsys.readouterr().err
    assert "error: training: step" in err and "Lower lr" in err
    run = Run.open(tmp_path / "run")
    tensors, records = last(run), run.read_metrics()
    assert all(t.isfinite().all() for t in tensors.values())
    (manifest, _) = checkpoint.newest_valid(run.checkpoints)
    assert 1 <= checkpoint.step_of(manifest) == records[-1].step < 12
    assert all(np.isfinite(record.loss) for record in records)


def test_a_run_saves_nothing_of_a_step_that_was_not_finite(tmp_path):
    state = State.fresh(TINY, (2,), torch.device("cpu"))
    state.note(torch.tensor(False))
    with pytest.raises(NonFiniteError):
        Run.create(tmp_path, TINY).save(state)
    assert not list((tmp_path / "checkpoints").glob("*"))


# ---- what sampling needs


def test_a_run_gives_back_its_averaged_network(whole):
    tensors = last(whole)
    denoiser, shape = Run.open(whole.path).denoiser()
    assert shape == (2,) and denoiser.sde == whole.recipe.make_sde()
    network = Run.open(whole.path).network()
    for net in (network, denoiser.net):
        assert not net.training
        for name, value in net.state_dict().items():
            assert torch.equal(value, tensors[f"ema.{name}"])
    assert network.classes == 0 and Run.open(whole.path).class_names == []


@pytest.fixture
def conditional(tmp_path):
    return train_run(tmp_path / "run", change(conditional=True, steps=2), quiet=True)


def test_sampling_needs_no_data_set(conditional):
    config = conditional.path / "config.yaml"
    config.write_text(config.read_text().replace("data: moons", "data: gone"))
    run = Run.open(conditional.path)
    assert run.network().classes == 2 and run.class_names == ["lower", "upper"] and not run.ink
    with pytest.raises(UnknownNameError, match="'gone' is unknown.*trained with that of sdeflow"):
        run.dataset()


def test_absent_plugins_are_all_named_with_where_they_came_from(conditional):
    config = conditional.path / "config.yaml"
    text = config.read_text().replace("network: mlp", "network: gone").replace("sde: c", "sde: x")
    config.write_text(text)
    with pytest.raises(UnknownNameError) as caught:
        Run.open(conditional.path).denoiser()
    for words in ("network 'gone' is unknown", "sde 'xosine' is unknown", "that of sdeflow"):
        assert words in str(caught.value)
    with pytest.raises(UnknownNameError, match="(?s)dataset 'a'.*network 'b'.*sde 'c'"):
        train_run(conditional.path, change(data="a", network="b", sde="c"))


def test_weights_of_another_network_are_refused_tensor_by_tensor(conditional):
    config = conditional.path / "config.yaml"
    config.write_text(config.read_text().replace("width: 16", "width: 8"))
    words = r"(?s)does not fit.* is float32 \(16, 2\), expected float32 \(8, 2\)"
    with pytest.raises(CheckpointError, match=words):
        Run.open(conditional.path).network()
