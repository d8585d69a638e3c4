"""Checkpoints: safetensors beside a JSON manifest with the sha256 of each file. Never a pickle.

A checkpoint of step 500 is `step_00000500.safetensors` and `step_00000500.json`, or, where the
weights are sharded, a folder `step_00000500` and the manifest beside it. The manifest is written
last and names the hash of every file: where it stands, the checkpoint is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from torch import Tensor

from sdeflow.errors import SdeflowError

from .files import free_name, replace

FORMAT = 2
SUFFIXES = (".safetensors", ".json")
"""Of the files that a manifest may list. Nothing else is opened, a pickle least of all."""

Facts = dict[str, Any]
Table = dict[str, str]
"""Names of tensors with their dtype and shape, such as "float32 (8, 2)"."""


class CheckpointError(SdeflowError, RuntimeError):
    """A checkpoint is missing, damaged, or does not fit."""


class Checkpoint(NamedTuple):
    """What was read, and what is wrong with the newer ones that were passed over."""

    manifest: Path
    step: int
    tensors: dict[str, Tensor]
    facts: Facts
    complaints: list[str]


# ---- writing


def stem(step: int) -> str:
    """The beginning of the names of a step's files; the rest follows a dot or a slash."""
    return f"step_{step:08d}"


def write(folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
    """Write a checkpoint; returns its manifest. A crash at any moment leaves the old ones whole.

    tensors: by name, on any device. facts: whatever else belongs to it, as plain JSON values.
    """
    from safetensors.torch import save

    data = save(_apart(tensors))
    weights = folder / f"{stem(step)}.safetensors"
    with _writing(folder, step):
        make_way(folder, step)
        replace(weights, data)
    files = {weights.name: hashlib.sha256(data).hexdigest()}
    return write_manifest(folder, step, files, facts, table(tensors))


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the host, each in memory of its own: tied weights are written twice."""
    found, held = {}, set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        place = own.untyped_storage().data_ptr()
        found[name] = own.clone() if place in held else own
        held.add(place)
    return found


def write_manifest(
    folder: Path,
    step: int,
    files: Mapping[str, str],
    facts: Mapping[str, Any],
    tensors: Mapping[str, str] | None = None,
) -> Path:
    """Write the manifest of files that stand in the folder already, fsynced; returns it.

    Call `make_way` before they are written. files: their sha256 by name, relative to the folder
    and with "/"; the names begin with `stem(step)`. tensors: their `table`, where one file holds
    them all whole.
    """
    from sdeflow import __version__

    body = {"format": FORMAT, "sdeflow": __version__, "step": step, "files": dict(files)}
    if tensors is not None:
        body["tensors"] = dict(tensors)
    body = json.loads(json.dumps({**body, "facts": dict(facts)}))  # as it will be read
    manifest = folder / f"{stem(step)}.json"
    with _writing(folder, step):
        replace(manifest, _encode({**body, "manifest_sha256": _digest(body)}))
    return manifest


def make_way(folder: Path, step: int) -> None:
    """Ready the folder for files of that step: a damaged checkpoint of it is renamed aside, a
    whole one loses its manifest, so that no crash leaves half of the old and half of the new."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / f"{stem(step)}.json"
    if not manifest.exists():
        return
    try:
        verify(manifest)
    except CheckpointError:
        set_aside(manifest)
    else:
        manifest.unlink()


def set_aside(manifest: Path) -> None:
    """Rename a checkpoint's files to *.damaged, the manifest first."""
    for path in (manifest, *_files_of(manifest.parent, manifest.stem)):
        if path.exists():
            path.rename(free_name(path, ".damaged"))


@contextlib.contextmanager
def _writing(folder: Path, step: int) -> Any:
    """Turn what the system says about a failed write into a sentence."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint of step {step} cannot be written to {folder} ({error}); those written "
            "before are whole: make room there, or make it writable, and resume"
        ) from error


# ---- reading


def read(manifest: Path) -> tuple[int, dict[str, Tensor], Facts]:
    """(step, tensors, facts) of a checkpoint, all of it checked against the hashes."""
    body, tensors = _examine(manifest, load=True)
    return body["step"], tensors, body["facts"]


def verify(manifest: Path) -> dict[str, Any]:
    """The manifest (step, files, facts, ...), it and its files checked against the hashes.

    An error names everything that is wrong. The files are read, not kept: for any size.
    """
    return _examine(manifest, load=False)[0]


def newest_valid(folder: Path) -> tuple[Path, list[str]]:
    """(manifest, complaints): the last checkpoint that is whole, and what ails the later ones."""
    manifest, _, complaints = _newest(folder, verify)
    return manifest, complaints


def newest(
    folder: Path, fits: Callable[[dict[str, Tensor], Facts], list[str]] = lambda *_: []
) -> Checkpoint:
    """The last checkpoint that is whole and fits, read; and what ails the later ones.

    fits: given tensors and facts, says what does not fit.
    """

    def take(manifest: Path) -> tuple[int, dict[str, Tensor], Facts]:
        step, tensors, facts = read(manifest)
        if problems := fits(tensors, facts):
            raise refusal(manifest, "does not fit", problems)
        return step, tensors, facts

    manifest, (step, tensors, facts), complaints = _newest(folder, take)
    return Checkpoint(manifest, step, tensors, facts, complaints)


def manifests(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    found = (m for m in folder.glob("step_*.json") if re.fullmatch(r"step_\d{8,}", m.stem))
    return sorted(found, key=step_of)


def step_of(manifest: Path) -> int:
    """The step in a manifest's name."""
    return int(manifest.stem.removeprefix("step_"))


def latest(folder: Path) -> Path:
    """The manifest of the last checkpoint, or an error that says how to get one."""
    found = manifests(folder)
    if not found:
        raise CheckpointError(f"no checkpoint in {folder}; train first: sdeflow train RUN")
    return found[-1]


def table(tensors: Mapping[str, Tensor]) -> Table:
    """The dtype and the shape of each tensor, as one reads them."""
    return {n: f"{str(t.dtype)[6:]} {tuple(t.shape)}" for n, t in tensors.items()}


def differences(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Every way in which a table of tensors is not the expected one."""
    lines = [f"missing: {name} ({expected[name]})" for name in expected if name not in found]
    lines += [f"unexpected: {name} ({found[name]})" for name in found if name not in expected]
    return lines + [
        f"{name} is {found[name]}, expected {what}"
        for name, what in expected.items()
        if name in found and found[name] != what
    ]


def _newest(folder: Path, take: Callable[[Path], Any]) -> tuple[Path, Any, list[str]]:
    """(manifest, what `take` made of it, complaints) of the last checkpoint that `take` accepts."""
    complaints: list[str] = []
    latest(folder)
    for manifest in reversed(manifests(folder)):
        try:
            return manifest, take(manifest), complaints
        except CheckpointError as error:
            complaints.append(str(error))
    raise CheckpointError(
        f"{folder} holds no checkpoint that can be used:\n" + "\n".join(complaints)
    )


def _examine(manifest: Path, load: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest and, if asked, the tensors; or one error that names everything wrong."""
    from safetensors import SafetensorError
    from safetensors.torch import load as parse

    body = read_manifest(manifest)
    tensors: dict[str, Tensor] = {}
    problems = []
    sharded = any("/" in name for name in body["files"])
    whole = load and not sharded
    for name, wanted in body["files"].items():
        path, parts = manifest.parent / name, PurePosixPath(name).parts
        if ".." in parts or name.startswith("/") or path.suffix not in SUFFIXES:
            problems.append(f"lists {name!r}: files are safetensors or JSON, in its own folder")
            continue
        try:
            if whole and path.suffix == ".safetensors":
                data = path.read_bytes()
                found = hashlib.sha256(data).hexdigest()
            else:
                with path.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != wanted:
                problems.append(f"{name} has sha256 {found[:12]}..., written was {wanted[:12]}...")
            elif whole and path.suffix == ".safetensors":
                tensors |= parse(data)
        except (OSError, SafetensorError) as error:
            problems.append(f"{name} cannot be read ({type(error).__name__}: {error})")
    folder = manifest.with_suffix("")
    if sharded and not problems:
        listed = {PurePosixPath(name).name for name in body["files"] if "/" in name}
        strays = {path.name for path in folder.iterdir()} - listed
        problems = [f"{folder.name}/{name} is not one of its files" for name in sorted(strays)]
    if load and sharded and not problems:
        from .sharded import assemble

        tensors |= assemble(folder)
    if load and not problems and "tensors" in body:
        problems = differences(body["tensors"], table(tensors))
    if problems:
        raise refusal(manifest, "is damaged", problems)
    return body, tensors


def read_manifest(manifest: Path) -> dict[str, Any]:
    """The manifest, if it is as it was written and of a format that is known here."""
    from sdeflow import __version__

    try:
        data = manifest.read_bytes()
        signed = json.loads(data)
        format, expected = signed["format"], signed["manifest_sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        problem = f"the manifest cannot be read ({type(error).__name__}: {error})"
        raise refusal(manifest, "is damaged", [problem]) from error
    problems = []
    body = {name: value for name, value in signed.items() if name != "manifest_sha256"}
    whole = _digest(body) == expected and _encode(signed) == data
    if not whole:
        problems.append(f"its manifest has sha256 {_digest(body)[:12]}..., not what was written")
    if isinstance(format, int) and format > FORMAT:
        problems.append(
            f"it has format {format}, of sdeflow {signed.get('sdeflow', '?')}; this is sdeflow "
            f"{__version__}, which reads format {FORMAT}: upgrade sdeflow"
        )
    elif whole and format != FORMAT:
        problems.append(f"it has format {format!r}; this sdeflow reads format {FORMAT}")
    elif whole and body["step"] != step_of(manifest):
        problems.append(f"it is of step {body['step']}, by its name of {step_of(manifest)}")
    if problems:
        raise refusal(manifest, "is damaged" if not whole else "cannot be used", problems)
    return body


def refusal(manifest: Path, what: str, problems: list[str]) -> CheckpointError:
    """One error for everything that is wrong with a checkpoint, a line for each."""
    lines = problems if len(problems) == 1 else ["", *problems]
    return CheckpointError(f"checkpoint {manifest} {what}: " + "\n  - ".join(lines))


def _encode(signed: Mapping[str, Any]) -> bytes:
    """The bytes of a manifest; read and encoded again they are the same."""
    return json.dumps(signed, indent=1).encode()


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


# ---- keeping house


def prune(folder: Path, keep: int = 2, best: int | None = None) -> None:
    """Remove all but the last `keep` checkpoints and the one of step `best`."""
    for manifest in manifests(folder)[:-keep]:
        if step_of(manifest) != best:
            manifest.rename(manifest.with_name(f".{manifest.name}.pruned"))
    sweep(folder)


def sweep(folder: Path) -> None:
    """Finish what was cut off: remove temporary files, and the files of pruned checkpoints."""
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for mark in folder.glob(".step_*.json.pruned"):
        for path in _files_of(folder, mark.name.removeprefix(".").removesuffix(".json.pruned")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        mark.unlink()


def _files_of(folder: Path, name: str) -> list[Path]:
    """The files of a checkpoint, less its manifest."""
    found = [p for p in folder.glob(f"{name}*") if p.name == name or p.name.startswith(f"{name}.")]
    return [p for p in found if ".damaged" not in p.name and p.name != f"{name}.json"]
