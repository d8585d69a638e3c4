"""SIGKILL at any instant of a run, inside a save too, loses no more than the steps since the last
checkpoint, and the run that goes on ends as the one that was never killed, bit for bit."""

import itertools
import json
import os
import random
import subprocess
import sys

import killing
import pytest
import torch
from sdeflow_plugins.train import checkpoint

KILLS = 50


@pytest.fixture(scope="module")
def server():
    """live(**order): how one run ended; a process that has torch imported forks it."""
    process = subprocess.Popen(
        [sys.executable, killing.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    def live(**order):
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    with process:
        yield live
        process.kill()


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """(folder, end) of the run that was never killed."""
    folder = tmp_path_factory.mktemp("whole")
    end = server(folder=str(folder))
    assert end["status"] == 0 and end["step"] == killing.RECIPE.steps
    return folder, end


class Lost(Exception):
    """A kill cost more than the steps since the last checkpoint."""


def check(folder, before, end):
    """The step of the newest checkpoint after a kill; nothing is damaged, nothing went back."""
    saved = max(before, end["step"])
    if not checkpoint.manifests(folder / "checkpoints"):
        if saved:
            raise Lost(f"step {saved} was saved, nothing is left")
        return 0
    try:
        manifest, complaints = checkpoint.newest_valid(folder / "checkpoints")
    except checkpoint.CheckpointError as error:  # none is whole
        raise Lost(str(error)) from error
    if complaints:
        raise Lost(complaints[0])
    if checkpoint.step_of(manifest) < saved:
        raise Lost(f"step {saved} was saved, {manifest.stem} is left")
    return checkpoint.step_of(manifest)


def torment(server, whole, tmp_path, kills, seed, fault=""):
    """Kill runs until there were so many kills; each run goes on until it ends, then it is compared
    with the whole one. Returns how often a run died while it saved.

    Every second kill comes by the clock, the others at a line of the code that saves.
    """
    rng, killed, saving = random.Random(seed), 0, 0
    names = (tmp_path / f"run_{number}" for number in itertools.count())
    while killed < kills:
        folder, step, ended = next(names), 0, False
        while not ended:
            order = {"folder": str(folder), "fault": fault}
            if killed < kills and killed % 2:
                order["line"] = rng.randint(1, whole[1]["lines"] // 2)
            elif killed < kills:
                order["delay"] = rng.uniform(0, whole[1]["seconds"])
            end = server(**order)
            assert end["status"] in (0, -9)
            step = check(folder, step, end)
            ended = end["status"] == 0
            killed += not ended
            saving += not ended and end["saving"]
        if not fault:  # a faulty writer may leave other files even where nothing was lost
            compare(folder, whole[0])
    return saving


def compare(folder, whole):
    """Weights, averages, optimizer and metrics are those of the whole run, and nothing is left."""
    a, b = (checkpoint.read(checkpoint.latest(f / "checkpoints")) for f in (folder, whole))
    assert a[0] == b[0] and a[1].keys() == b[1].keys()
    assert any(name.startswith("optimizer.") for name in a[1])
    assert any(name.startswith("ema.") for name in a[1])
    assert all(torch.equal(a[1][name], b[1][name]) for name in b[1])
    names = [sorted(p.name for p in (f / "checkpoints").iterdir()) for f in (folder, whole)]
    assert names[0] == names[1]
    for name in ("metrics.csv", "config.yaml", "checkpoints/best.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_a_run_killed_at_any_instant_goes_on_to_the_same_end(server, whole, tmp_path):
    saving = torment(server, whole, tmp_path, KILLS, seed=0)
    assert saving >= 0.4 * KILLS


@pytest.mark.parametrize("fault", ["in_place", "old_ones_first"])
def test_a_writer_that_can_lose_a_checkpoint_is_found_out(server, whole, tmp_path, fault):
    """The planted faults of the test above."""
    with pytest.raises(Lost):
        torment(server, whole, tmp_path, KILLS, seed=0, fault=fault)
