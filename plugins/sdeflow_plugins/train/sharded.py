"""Checkpoints of sharded weights: each rank writes and reads its share of the tensors.

A checkpoint is a folder of safetensors files, written and read by torch.distributed.checkpoint,
and beside it the manifest with their sha256. Any number of processes can read it, whether they
shard the weights or not. No pickle is written or read.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint import load as load_shards
from torch.distributed.checkpoint import save as save_shards
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor

from . import checkpoint
from .files import sync
from .state import State

T = TypeVar("T")


def is_sharded(state: State) -> bool:
    """Whether each rank holds a share of the state's weights only."""
    return any(isinstance(p, DTensor) for p in state.network.parameters())


def write(folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
    """Write a sharded checkpoint; returns its manifest. All ranks have to call this.

    As `checkpoint.write`, but each rank writes its shards, in the folder `stem(step)`, which all
    ranks share. A crash at any moment leaves the older checkpoints whole.
    """
    name = checkpoint.stem(step)
    place, temporary = folder / name, folder / f".{name}.tmp"

    def begin() -> None:
        checkpoint.make_way(folder, step)
        for old in (place, temporary):  # of a crash before the manifest
            if old.exists():
                shutil.rmtree(old)
        temporary.mkdir()

    _on_first(begin)
    with _quiet():
        save_shards(
            {n: t.detach() for n, t in tensors.items()},
            storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True),
            no_dist=not _connected(),
        )
    hashes = _hashes(temporary)

    def end() -> Path:
        sync(temporary)
        temporary.rename(place)
        sync(folder)
        files = {f"{name}/{file}": sha256 for file, sha256 in sorted(hashes.items())}
        return checkpoint.write_manifest(folder, step, files, facts, checkpoint.table(tensors))

    return _on_first(end)


def read(manifest: Path, state: State) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    """(step, tensors, facts) of any checkpoint, the tensors sharded as the state's are.

    All ranks have to call this. Each reads its own shards, into the weights of the state; give
    the result to `state.unpack`. The hashes are checked first.
    """
    body = _on_first(lambda: checkpoint.verify(manifest))
    step, facts = body["step"], body["facts"]
    if not is_sharded(state):
        return checkpoint.read(manifest)
    likes = _likes(state, body["tensors"])
    folder = manifest.parent / manifest.stem
    if not folder.is_dir():
        _, tensors, _ = checkpoint.read(manifest)
        return step, {n: _spread(t, likes[n]) for n, t in tensors.items()}, facts
    with _quiet():
        load_shards(likes, storage_reader=HuggingFaceStorageReader(str(folder)))
    return step, likes, facts


def newest_valid(folder: Path) -> tuple[Path, list[str]]:
    """As `checkpoint.newest_valid`: what rank 0 finds, on every rank."""
    return _on_first(lambda: checkpoint.newest_valid(folder))


def assemble(folder: Path) -> dict[str, Tensor]:
    """The whole tensors of a folder of shards, read by this process alone."""
    reader = HuggingFaceStorageReader(str(folder))
    tensors = {
        name: torch.empty(what.size, dtype=what.properties.dtype)
        for name, what in reader.read_metadata().state_dict_metadata.items()
        if isinstance(what, TensorStorageMetadata)
    }
    with _quiet():
        load_shards(tensors, storage_reader=reader, no_dist=True)
    return tensors


def _likes(state: State, table: checkpoint.Table) -> dict[str, Tensor]:
    """Tensors to read a checkpoint of that table into: the state's own, and room for others."""
    own, _ = state.pack()
    needed = checkpoint.table({n: t for n, t in own.items() if not n.startswith("optimizer.")})
    if problems := [
        line for line in checkpoint.differences(needed, {n: table[n] for n in needed if n in table})
    ]:
        raise checkpoint.CheckpointError("the checkpoint does not fit: " + "; ".join(problems))
    parameters = list(state.network.parameters())
    likes = {}
    for name, what in table.items():
        dtype, shape = _parse(what)
        if name in own:
            likes[name] = own[name]
            continue
        likes[name] = torch.zeros(shape, dtype=dtype)
        if name.startswith("optimizer.") and shape:
            parameter = parameters[int(name.split(".")[1])]
            if parameter.shape == shape:
                likes[name] = torch.zeros_like(parameter, dtype=dtype).detach()
    return likes


def _parse(what: str) -> tuple[torch.dtype, torch.Size]:
    """The dtype and shape of an entry of a table, such as "float32 (8, 2)"."""
    dtype, shape = what.split(" ", 1)
    return getattr(torch, dtype), torch.Size(int(n) for n in shape.strip("()").split(",") if n)


def _spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, sharded as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def _hashes(folder: Path) -> dict[str, str]:
    """The sha256 of each file, the ranks taking turns."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if _connected() else (0, 1)
    found = {}
    for path in sorted(folder.iterdir())[rank::world]:
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    if not _connected():
        return found
    shares: list[Any] = [None] * world
    dist.all_gather_object(shares, found)
    return {name: sha256 for share in shares for name, sha256 in share.items()}


def _on_first(act: Callable[[], T]) -> T:
    """What rank 0 gets by `act`, on every rank; where it fails, all do."""
    if not _connected():
        return act()
    told: list[Any] = [None, ""]
    try:
        if dist.get_rank() == 0:
            told[0] = act()
    except BaseException as error:
        told[1] = f"{type(error).__name__}: {error}"
        raise
    finally:
        dist.broadcast_object_list(told)
        if told[1] and dist.get_rank():
            raise checkpoint.CheckpointError(f"rank 0: {told[1]}")
    return told[0]


def _connected() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks on what is meant to be so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")
        yield
