"""Checkpoint files: whole or refused, whatever happened to them; and one process at a time."""

import hashlib
import json
import os
import pickle
import resource
import signal

import pytest
import torch
from sdeflow_plugins.train import checkpoint, files
from sdeflow_plugins.train.checkpoint import CheckpointError
from sdeflow_plugins.train.lock import LockedError, locked

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python >= 3.12

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7)}


@pytest.fixture
def saved(tmp_path):
    return checkpoint.write(tmp_path, 3, TENSORS, {"note": "x", "loss": 1e-5})


def signed(manifest, **changes):
    """Change a manifest and sign it again, as another version or a forger would."""
    body = json.loads(manifest.read_bytes()) | changes
    del body["manifest_sha256"]
    body["manifest_sha256"] = checkpoint._digest(body)
    manifest.write_bytes(checkpoint._encode(body))


def rewritten(manifest, tensors):
    """Put other tensors in a checkpoint, with a hash that fits."""
    from safetensors.torch import save

    data = save(tensors)
    manifest.with_suffix(".safetensors").write_bytes(data)
    name = manifest.with_suffix(".safetensors").name
    signed(manifest, files={name: hashlib.sha256(data).hexdigest()})


# ---- there and back


def test_a_checkpoint_comes_back(saved):
    step, found, facts = checkpoint.read(saved)
    assert step == 3 and facts == {"note": "x", "loss": 1e-5} and found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert not list(saved.parent.glob(".*")), "a temporary file was left"


def test_a_manifest_names_its_version_and_the_hash_of_each_file(saved):
    from sdeflow import __version__

    body = checkpoint.verify(saved)
    weights = saved.with_suffix(".safetensors")
    assert body["sdeflow"] == __version__ and body["format"] == checkpoint.FORMAT
    assert body["files"] == {weights.name: hashlib.sha256(weights.read_bytes()).hexdigest()}


def test_facts_come_back_as_json_has_them(tmp_path):
    manifest = checkpoint.write(tmp_path, 1, TENSORS, {"k": {10: 1, 9: (1, 2)}, "x": float("inf")})
    assert checkpoint.read(manifest)[2] == {"k": {"10": 1, "9": [1, 2]}, "x": float("inf")}


def test_tied_and_strided_tensors_are_written(tmp_path):
    x = torch.arange(6.0).reshape(2, 3)
    manifest = checkpoint.write(tmp_path, 1, {"x": x, "tied": x, "view": x.T}, {})
    found = checkpoint.read(manifest)[1]
    assert torch.equal(found["tied"], x) and torch.equal(found["view"], x.T)


# ---- damage


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_flipped_bit_in_any_byte_is_found(saved, suffix):
    file = saved.with_suffix(suffix)
    whole = file.read_bytes()
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match="step_00000003"):
            checkpoint.read(saved)
    file.write_bytes(whole)
    checkpoint.read(saved)


def test_a_digest_of_the_values_alone_misses_a_flipped_bit(saved):
    """The planted fault of the test above: 1e-05 and 1E-05 are one number."""
    data = saved.read_bytes()
    assert data.count(b"1e-05") == 1
    saved.write_bytes(data.replace(b"1e-05", b"1E-05"))
    body = json.loads(saved.read_bytes())
    assert checkpoint._digest(body | {}) and body.pop("manifest_sha256") == checkpoint._digest(body)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.read(saved)


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_short_a_long_and_a_missing_file_are_found(saved, suffix):
    file = saved.with_suffix(suffix)
    data = file.read_bytes()
    for damaged in (data[:-1], data[: len(data) // 2], b"", data + b"\n"):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            checkpoint.read(saved)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read(saved)


def test_one_error_names_every_damaged_file(tmp_path):
    shards = [tmp_path / "step_00000004" / f"{k}.safetensors" for k in range(3)]
    shards[0].parent.mkdir()
    for shard in shards:
        shard.write_bytes(b"weights")
    names = {f"step_00000004/{s.name}": hashlib.sha256(b"weights").hexdigest() for s in shards}
    manifest = checkpoint.write_manifest(tmp_path, 4, names, {"n": 1})
    assert checkpoint.verify(manifest)["files"] == names
    shards[0].write_bytes(b"wheights")
    shards[2].unlink()
    with pytest.raises(CheckpointError) as caught:
        checkpoint.verify(manifest)
    assert "4/0.safetensors has sha256" in str(caught.value)
    assert "4/2.safetensors cannot be read" in str(caught.value)
    assert "4/1.safetensors" not in str(caught.value)


def test_one_error_names_every_tensor_that_is_not_as_the_manifest_says(saved):
    tensors = {"a": torch.zeros(3, 2), "b": torch.tensor(7.0), "c": torch.zeros(1)}
    rewritten(saved, tensors)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(saved)
    for line in (
        "unexpected: c (float32 (1,))",
        "a is float32 (3, 2), expected float32 (2, 3)",
        "b is float32 (), expected int64 ()",
    ):
        assert line in str(caught.value)
    rewritten(saved, {"b": TENSORS["b"]})
    with pytest.raises(CheckpointError, match=r"missing: a \(float32 \(2, 3\)\)"):
        checkpoint.read(saved)


def test_a_newer_format_asks_for_a_newer_sdeflow(saved):
    signed(saved, format=checkpoint.FORMAT + 1, sdeflow="9.1", new_field=[1])
    with pytest.raises(CheckpointError, match=r"format 3, of sdeflow 9\.1.*upgrade sdeflow"):
        checkpoint.read(saved)


def test_a_renamed_manifest_is_refused(saved):
    with pytest.raises(CheckpointError, match="of step 3, by its name of 9"):
        checkpoint.read(saved.rename(saved.with_name("step_00000009.json")))


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


@pytest.mark.parametrize("name", ["step_00000003.pt", "step_00000003.pkl", "step_00000003.bin"])
def test_a_pickle_is_never_opened(saved, name, monkeypatch):
    monkeypatch.chdir(saved.parent)
    file = saved.parent / name
    file.write_bytes(pickle.dumps(Bomb()))
    assert checkpoint.newest_valid(saved.parent) == (saved, [])  # in the folder: ignored
    signed(saved, files={name: hashlib.sha256(file.read_bytes()).hexdigest()})
    with pytest.raises(CheckpointError, match="safetensors or JSON"):  # listed: refused
        checkpoint.read(saved)
    assert not (saved.parent / "exploded").exists()


def test_a_manifest_reaches_no_file_outside_its_folder(saved):
    outside = saved.parent.parent / "other.safetensors"
    outside.write_bytes(saved.with_suffix(".safetensors").read_bytes())
    digest = hashlib.sha256(outside.read_bytes()).hexdigest()
    for name in ("../other.safetensors", str(outside)):
        signed(saved, files={name: digest})
        with pytest.raises(CheckpointError, match="in its own folder"):
            checkpoint.read(saved)


# ---- which one is used


def test_the_newest_whole_checkpoint_is_used_and_the_damaged_ones_are_named(tmp_path):
    manifests = [checkpoint.write(tmp_path, step, TENSORS, {"k": step}) for step in (1, 2, 3)]
    assert checkpoint.newest_valid(tmp_path) == (manifests[2], [])
    manifests[2].with_suffix(".safetensors").write_bytes(b"")
    manifests[1].write_text("{")
    found, complaints = checkpoint.newest_valid(tmp_path)
    assert found == manifests[0] and checkpoint.newest(tmp_path).facts == {"k": 1}
    assert ["step_00000003" in complaints[0], "step_00000002" in complaints[1]] == [True, True]
    manifests[0].unlink()
    with pytest.raises(CheckpointError, match="(?s)no checkpoint that can be.*0003.*0002"):
        checkpoint.newest_valid(tmp_path)


def test_a_checkpoint_that_does_not_fit_is_passed_over(tmp_path):
    for step in (1, 2):
        checkpoint.write(tmp_path, step, TENSORS, {})
    found = checkpoint.newest(tmp_path, lambda *_: misfits.pop())
    assert found.step == 1 and "does not fit" in found.complaints[0]
    assert "first" in found.complaints[0] and "second" in found.complaints[0]


misfits = [[], ["first", "second"]]


def test_an_empty_folder_says_how_to_get_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="train first: sdeflow train"):
        checkpoint.newest_valid(tmp_path)


# ---- writing


def test_a_crash_while_writing_leaves_the_old_checkpoint(saved, monkeypatch):
    def crash(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(saved.parent, 4, TENSORS, {})
    assert checkpoint.newest_valid(saved.parent) == (saved, [])
    assert sorted(f.suffix for f in saved.parent.iterdir()) == [".json", ".safetensors"]


def test_a_full_disk_is_an_error_that_leaves_the_old_checkpoint(saved):
    """The system itself refuses: a limit on the size of files, in a child of this process."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            checkpoint.write(saved.parent, 4, {"a": torch.zeros(1000)}, {})
        except CheckpointError as error:
            os._exit(0 if "cannot be written" in str(error) and "resume" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert checkpoint.newest_valid(saved.parent) == (saved, [])
    assert sorted(f.suffix for f in saved.parent.iterdir()) == [".json", ".safetensors"]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.write(tmp_path / "taken", 4, TENSORS, {})


def test_a_damaged_checkpoint_of_the_same_step_is_renamed_aside(saved):
    weights = saved.with_suffix(".safetensors")
    for number in range(2):
        weights.write_bytes(b"damaged %d" % number)
        checkpoint.write(saved.parent, 3, TENSORS, {})
        checkpoint.verify(saved)
    aside = sorted(f for f in saved.parent.iterdir() if "damaged" in f.name)
    assert [f.read_bytes() for f in aside if "safetensors" in f.name] == [
        b"damaged 0",
        b"damaged 1",
    ]
    assert len(aside) == 4 and checkpoint.manifests(saved.parent) == [saved]


def test_only_the_last_checkpoints_and_the_best_are_kept(tmp_path):
    for step in (1, 2, 3, 10, 100_000_000):
        checkpoint.write(tmp_path, step, {"a": torch.zeros(1)}, {})
    checkpoint.prune(tmp_path, keep=2, best=1)
    steps = [checkpoint.step_of(m) for m in checkpoint.manifests(tmp_path)]
    assert steps == [1, 10, 100_000_000] and len(list(tmp_path.iterdir())) == 6
    checkpoint.prune(tmp_path, keep=1)
    assert checkpoint.newest_valid(tmp_path)[0].stem == "step_100000000"
    assert len(list(tmp_path.iterdir())) == 2


def test_pruning_that_was_cut_off_is_finished(saved):
    (saved.parent / ".step_00000004.safetensors.1.tmp").write_bytes(b"half")
    saved.rename(saved.with_name(".step_00000003.json.pruned"))
    checkpoint.sweep(saved.parent)
    assert not list(saved.parent.iterdir())


# ---- one process at a time


def test_a_second_holder_of_a_folder_is_refused_and_told_who_the_first_is(tmp_path):
    with locked(tmp_path):
        with pytest.raises(LockedError, match=f"another process .*{os.getpid()}"):
            with locked(tmp_path):
                pass
    with locked(tmp_path):
        pass


def test_a_killed_holder_holds_nothing_and_neither_do_its_children(tmp_path):
    ready, write = os.pipe()
    holder = os.fork()
    if not holder:
        with locked(tmp_path):
            if not os.fork():  # a worker that outlives it
                os.write(write, f"{os.getpid():08d}".encode())
                signal.pause()
            signal.pause()
    worker = int(os.read(ready, 8))
    try:
        with pytest.raises(LockedError):
            with locked(tmp_path):
                pass
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        with locked(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
