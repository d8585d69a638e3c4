"""Checkpoints: safetensors beside a JSON manifest with its sha256. Never a pickle.

A checkpoint of step 500 is `step_00000500.safetensors` and `step_00000500.json`. The manifest is
written last and names the hash of the weights: where it stands, the weights are whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sdeflow.errors import SdeflowError

FORMAT = 1


class CheckpointError(SdeflowError, RuntimeError):
    """A checkpoint is missing, damaged, or does not fit."""


def write(folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
    """Write a checkpoint; returns its manifest. A crash at any moment leaves the old ones whole.

    tensors: by name, on any device. facts: whatever else belongs to it, as plain JSON values.
    """
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / f"step_{step:08d}.safetensors"
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    _replace(weights, data)
    body = {
        "format": FORMAT,
        "step": step,
        "file": weights.name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "facts": dict(facts),
    }
    manifest = weights.with_suffix(".json")
    signed = {**body, "manifest_sha256": _digest(body)}
    _replace(manifest, json.dumps(signed, indent=1).encode())
    return manifest


def read(manifest: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    """(step, tensors, facts) of a checkpoint, all of it checked against the hashes."""
    from safetensors.torch import load

    try:
        signed = json.loads(manifest.read_bytes())
        expected = signed.pop("manifest_sha256")
        data = manifest.with_name(signed["file"]).read_bytes()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint {manifest} cannot be read ({type(error).__name__}: {error}); "
            "remove it and go on from an earlier one"
        ) from error
    for what, found, wanted in (
        (manifest, _digest(signed), expected),
        (manifest.with_name(signed["file"]), hashlib.sha256(data).hexdigest(), signed["sha256"]),
    ):
        if found != wanted:
            raise CheckpointError(
                f"checkpoint {what} is damaged: its sha256 is {found[:12]}..., written was "
                f"{str(wanted)[:12]}...; remove it and go on from an earlier one"
            )
    if signed["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint {manifest} has format {signed['format']!r}, this version reads {FORMAT}"
        )
    return signed["step"], load(data), signed["facts"]


def manifests(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(folder.glob("step_*.json"))


def latest(folder: Path) -> Path:
    """The manifest of the last checkpoint, or an error that says how to get one."""
    found = manifests(folder)
    if not found:
        raise CheckpointError(f"no checkpoint in {folder}; train first: sdeflow train RUN")
    return found[-1]


def prune(folder: Path, keep: int = 2) -> None:
    """Remove all but the last `keep` checkpoints, manifests first."""
    for manifest in manifests(folder)[:-keep]:
        manifest.unlink()
        manifest.with_suffix(".safetensors").unlink(missing_ok=True)


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _replace(path: Path, data: bytes) -> None:
    """Put a file in place in one go: temporary name, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
