"""Several processes and machines: torchrun on the loopback, each job once with all its checks.

What the processes do is in ranks_at_work.py; rank 0 leaves its results in files.
"""

import dataclasses
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import ranks_at_work as work
import torch
from ranks_at_work import FSDP, RECIPE, SEEDS, SESSION, STOP
from safetensors.torch import load_file
from sdeflow_plugins.generate.command import _device
from sdeflow_plugins.ranks import Ranks
from sdeflow_plugins.train import checkpoint, sharded
from sdeflow_plugins.train.engine import describe, make_fabric
from sdeflow_plugins.train.run import Run
from sdeflow_plugins.train.session import train_run

from sdeflow import ArgumentError

ONE_MACHINE = (
    "straight resumed accumulated fsdp fsdp_resumed fsdp_from_ddp ddp_from_fsdp local_noise "
    "samples session fsdp_session disagree"
).split()
TWO_MACHINES = ["straight", "resumed", "samples", "refused"]
NEAR = 1e-6
"""Times the largest number of its kind; float32 has 6e-8. Measured 1.8e-7, with the fault 0.27."""


def torchrun(folder, tasks, launchers):
    """Run the tasks under torchrun; (exit status, output) of each launcher. It cannot hang."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    quiet = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback, "PYTHONUNBUFFERED": "1"}
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST")} | quiet
    launch = [sys.executable, "-m", "torch.distributed.run"]
    started = [
        subprocess.Popen(
            [*launch, *options, work.__file__, folder, *tasks],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for options in launchers
    ]
    deadline = time.monotonic() + 150
    try:
        outputs = [p.communicate(timeout=deadline - time.monotonic())[0] for p in started]
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return list(zip([process.returncode for process in started], outputs, strict=True))


def job(tmp_path_factory, name, tasks, launchers):
    """(folder, results, [status, output] of each launcher, seconds) of a job, which is run once:
    the workers of pytest-xdist share it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder, told = root / name, root / f"{name}.json"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not told.exists():
            folder.mkdir()
            start = time.monotonic()
            ended = torchrun(folder, tasks, launchers)
            told.write_text(json.dumps([ended, time.monotonic() - start]))
    files = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    return folder, files, *json.loads(told.read_text())


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """(folder, results, output) of two processes on one machine."""
    options = ["--standalone", "--nproc-per-node=2"]
    folder, files, ((status, output),), _ = job(tmp_path_factory, "machine", ONE_MACHINE, [options])
    assert status == 0, output
    return folder, files, output


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """The job of two machines with one process each, both on the loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        *("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=test"),
        *(f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"),
    ]
    return job(tmp_path_factory, "machines", TWO_MACHINES, [options, options])


@pytest.fixture(scope="module")
def alone():
    """The same training in this one process."""
    return work.result(*work.train(RECIPE))


def kind(name):
    """network, ema, losses; of the optimizer's memory exp_avg, exp_avg_sq, step."""
    return name.rsplit(".", 1)[-1] if name.startswith("optimizer.") else name.split(".")[0]


def gap(a, b):
    """The largest difference of two results, each tensor by the largest number of its kind."""
    assert a.keys() == b.keys()
    scale = {}
    for name in a:
        scale[kind(name)] = max(scale.get(kind(name), 0.0), float(a[name].abs().max()))
    return max(float((a[name] - b[name]).abs().max()) / scale[kind(name)] for name in a)


# ---- training


def test_two_processes_train_as_one_with_the_same_batch(machine, alone):
    assert "2 processes on 1 machine, fp32 on cpu, DDP over gloo" in machine[2]
    assert gap(alone, machine[1]["straight"]) < NEAR


def test_two_machines_train_as_one(machines, alone):
    assert "2 processes on 2 machines, fp32 on cpu, DDP over gloo" in str(machines[2])
    assert gap(alone, machines[1]["straight"]) < NEAR


def test_eight_steps_a_checkpoint_and_twelve_are_twenty(machine, machines):
    for job in (machine[1], machines[1]):
        assert gap(job["straight"], job["resumed"]) == 0


def test_accumulation_does_not_change_what_two_processes_do(machine, alone):
    assert gap(alone, machine[1]["accumulated"]) < NEAR


def test_noise_of_each_ranks_own_is_found_out(machine, alone):
    """The planted fault of the tests above."""
    assert gap(alone, machine[1]["local_noise"]) > 1e4 * NEAR


# ---- sharded weights


def test_sharded_weights_train_as_whole_ones(machine, alone):
    assert gap(machine[1]["straight"], machine[1]["fsdp"]) < NEAR
    assert gap(alone, machine[1]["fsdp"]) < NEAR


def test_a_sharded_run_resumes_bit_for_bit(machine):
    assert gap(machine[1]["fsdp"], machine[1]["fsdp_resumed"]) == 0


def after_stop(tensors):
    return {**tensors, "losses": tensors["losses"][STOP:]}


def test_ddp_and_fsdp_take_up_each_others_checkpoints(machine, alone):
    for name in ("fsdp_from_ddp", "ddp_from_fsdp"):
        assert gap(after_stop(alone), machine[1][name]) < NEAR, name


def test_one_process_takes_up_the_shards_of_two(machine, alone):
    manifest = checkpoint.latest(machine[0] / "shards")
    files = checkpoint.verify(manifest)["files"]
    assert len(files) == 2 and all(name.startswith("step_00000008/shard-") for name in files)
    assert gap(after_stop(alone), work.result(*work.train(RECIPE, manifest))) < NEAR


def test_shards_put_together_are_the_checkpoint_of_whole_weights(machine):
    (a, left, facts), (b, right, other) = (
        checkpoint.read(checkpoint.latest(machine[0] / name)) for name in ("shards", "whole")
    )
    assert a == b == STOP and facts == other and facts["note"] == "ours"
    assert gap(left, right) < NEAR


def test_each_rank_holds_and_writes_its_share(machine):
    folder = machine[0] / "shards" / "step_00000008"
    shares = [load_file(path) for path in sorted(folder.iterdir())]
    table = checkpoint.verify(folder.with_suffix(".json"))["tensors"]
    sharded = [name for name, what in table.items() if what.startswith("float32 (15,")]
    assert len(sharded) > 20 and {kind(name) for name in sharded} >= {"network", "ema", "exp_avg"}
    for name in sharded:
        assert [len(share[name]) for share in shares] == [8, 7], name


@pytest.fixture
def shards(machine, tmp_path):
    """A copy of the sharded checkpoint: (manifest, files)."""
    source = machine[0] / "shards"
    for path in [p for p in source.rglob("*") if p.is_file()]:
        place = tmp_path / path.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(path.read_bytes())
    return checkpoint.latest(tmp_path), sorted((tmp_path / "step_00000008").iterdir())


@pytest.mark.parametrize("place", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("which", [0, 1])
def test_a_flipped_bit_in_a_shard_is_found(shards, which, place):
    manifest, files = shards
    data = bytearray(files[which].read_bytes())
    data[int(place * len(data))] ^= 1
    files[which].write_bytes(data)
    for attempt in (checkpoint.read, checkpoint.verify, lambda m: sharded.read(m, None)):
        with pytest.raises(checkpoint.CheckpointError, match=f"{files[which].name} has sha256"):
            attempt(manifest)


def test_a_missing_a_short_and_a_foreign_shard_are_found(shards):
    manifest, (first, second) = shards
    (first.parent / "shard-00003-model-00001-of-00001.safetensors").write_bytes(first.read_bytes())
    with pytest.raises(checkpoint.CheckpointError, match="shard-00003.* is not one of its files"):
        checkpoint.read(manifest)
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.read(manifest)
    assert "shard-00001" in str(caught.value) and "shard-00002" in str(caught.value)


def test_a_sharded_checkpoint_holds_no_pickle(machine):
    names = {p.name for p in machine[0].rglob("*") if p.is_file()}
    assert not {".metadata", "meta.pt"} & names
    assert {p.suffix for p in (machine[0] / "shards").rglob("*") if p.is_file()} == {
        ".json",
        ".safetensors",
    }


# ---- runs


def test_a_run_of_two_processes_is_the_run_of_one(machine, tmp_path):
    one = train_run(tmp_path / "one", SESSION, quiet=True)
    step, expected, _ = checkpoint.read(checkpoint.latest(one.checkpoints))
    for name in ("run", "fsdp_run"):
        run = Run.open(machine[0] / name)
        found_step, found, _ = checkpoint.read(checkpoint.latest(run.checkpoints))
        assert step == found_step and gap(expected, found) < NEAR
        for a, b in zip(one.read_metrics(), run.read_metrics(), strict=True):
            assert b.step == a.step and b.loss == pytest.approx(a.loss, rel=1e-5)
        denoiser, shape = run.denoiser()
        assert shape == (2,)
        assert all(torch.equal(v, found[f"ema.{n}"]) for n, v in denoiser.net.state_dict().items())


def test_what_rank_0_refuses_ends_all_ranks_soon(machines):
    _, found, ended, seconds = machines
    assert found.keys() == {"straight", "resumed", "samples"}
    assert all(status != 0 for status, _ in ended) and seconds < 120
    assert "holds checkpoints already" in str(ended)


# ---- sampling


def test_samples_of_one_process_two_and_two_machines_are_the_same_bits(machine, machines, tmp_path):
    alone = work.samples(tmp_path)["x"]
    assert len(alone) == len(SEEDS)
    for job in (machine, machines):
        assert torch.equal(job[1]["samples"]["x"], alone)
        assert not list((job[0] / "samples").iterdir())


# ---- what the environment and the recipe say


def elastic(monkeypatch, rank=0, world=2, local=2, nodes=1):
    settings = {
        "TORCHELASTIC_RUN_ID": "x",
        "RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_RANK": rank % local,
        "LOCAL_WORLD_SIZE": local,
        "GROUP_WORLD_SIZE": nodes,
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))


def test_ranks_that_disagree_or_stay_away_are_named(machine):
    assert machine[1]["disagree"]["done"], "the checks are in ranks_at_work.disagree"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_process_is_never_taken_for_several(strategy):
    recipe = dataclasses.replace(RECIPE, strategy=strategy)
    with pytest.raises(ArgumentError, match=f"strategy='{strategy}'.*only one.*torchrun"):
        make_fabric(recipe)


def test_one_process_says_so():
    assert describe(make_fabric(RECIPE)) == "1 process, fp32 on cpu"
    bf16 = dataclasses.replace(RECIPE, precision="bf16")
    assert describe(make_fabric(bf16)) == "1 process, bf16 on cpu"


@pytest.mark.parametrize(
    ("size", "rank", "by"),
    [
        ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "srun"),
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "mpirun"),
        ("WORLD_SIZE", "RANK", "the environment"),
    ],
)
def test_processes_of_other_launchers_are_refused(monkeypatch, size, rank, by):
    monkeypatch.setenv(size, "4")
    monkeypatch.setenv(rank, "3")
    with pytest.raises(ArgumentError, match=f"{by} says that this is process 3 of 4.*torchrun"):
        make_fabric(RECIPE)
    monkeypatch.setenv(size, "1")
    assert make_fabric(RECIPE).world_size == 1


def test_machines_with_different_numbers_of_processes_are_refused(monkeypatch):
    elastic(monkeypatch, world=3, local=2, nodes=2)
    with pytest.raises(ArgumentError, match="3 processes on 2 machines.*same --nproc-per-node"):
        make_fabric(RECIPE)


def test_a_broken_environment_is_named(monkeypatch):
    elastic(monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", "one")
    with pytest.raises(ArgumentError, match="LOCAL_RANK='one'"):
        Ranks.here()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    elastic(monkeypatch, world=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ArgumentError, match="2 processes on this machine, which has 1 CUDA"):
        make_fabric(dataclasses.replace(FSDP, device="auto"))


def test_each_rank_of_a_machine_samples_on_a_gpu_of_its_own(monkeypatch):
    elastic(monkeypatch, rank=3, world=4, local=2, nodes=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert _device("auto") == _device("cuda") == torch.device("cuda", 1)
    assert _device("cpu") == torch.device("cpu")


def test_the_ranks_say_how_many_they_are():
    assert str(Ranks()) == "1 process"
    assert str(Ranks(3, 4, 1, 2, 2)) == "4 processes on 2 machines"
