"""Samples of many seeds: dealt in batches to the processes of torchrun, put together in order.

The list of seeds is cut into batches, and rank r draws the batches r, r + world, ... Which seeds
make a batch is not a matter of the ranks, so that any number of them gives the same bits. Each
batch is written to a file of its own, and rank 0 puts the files together: a run that was broken
off goes on from the files that are there.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from platform import node
from typing import Any, Protocol

import torch
from torch import Tensor

from sdeflow.errors import ArgumentError, positive_int
from sdeflow.noise import check_seed

from ..ranks import RankError, Ranks, wait

MOST = 10_000_000
"""Seeds in one list; more is taken for a slip of the pen."""
_calls = itertools.count()


class Drawn(Protocol):
    """What a draw returns, such as a Solution: samples x (B, *), and the evaluations of each."""

    @property
    def x(self) -> Tensor: ...

    @property
    def nfe(self) -> int: ...


Draw = Callable[[list[int], slice], Drawn]
"""draw(seeds, places): the samples of a batch of seeds, which stand at `places` of the list (for
whatever else goes by place, such as labels)."""


@dataclass(frozen=True)
class Samples:
    """x: the samples (N, *), on the host, in the order of the seeds. nfe: evaluations of each."""

    x: Tensor
    seeds: list[int]
    nfe: int


def parse_seeds(seeds: str | int | Sequence[int]) -> list[int]:
    """The seeds of "0-9999", of "0-9,20,30-39" (both ends count), or of a list, in that order."""
    if isinstance(seeds, str):
        found: list[int] = []
        for item in seeds.strip().removeprefix("[").removesuffix("]").split(","):
            ends = re.fullmatch(r"(\d+)(?:-(\d+))?", item.strip(), re.ASCII)
            if ends is None:
                raise ArgumentError(
                    f"seeds={seeds!r}: {item.strip()!r} is neither a whole number >= 0 nor a "
                    "range; write them as 0-63 or 0-9,20,30-39"
                )
            first, last = int(ends[1]), int(ends[2] or ends[1])
            if last < first:
                raise ArgumentError(f"seeds={seeds!r}: the range {item.strip()} runs backwards")
            if last - first + len(found) >= MOST:
                raise ArgumentError(f"seeds={seeds!r} are more than {MOST:,}")
            found.extend(range(first, last + 1))
    else:
        found = [seeds] if isinstance(seeds, int) else list(seeds)
    if not found:
        raise ArgumentError("seeds=[] is empty; give one for each sample, such as 0-63")
    checked = check_seed(found, len(found))
    assert not isinstance(checked, int)
    return list(checked)


def batches(n: int, batch: int, rank: int = 0, world: int = 1) -> list[tuple[int, slice]]:
    """The batches of a rank, (number, places in the list): every world-th one."""
    n, batch = positive_int("n", n), positive_int("batch", batch)
    numbers = range(rank, -(-n // batch), world)
    return [(k, slice(k * batch, min((k + 1) * batch, n))) for k in numbers]


@contextmanager
def sample_seeds(
    draw: Draw,
    seeds: str | Sequence[int],
    batch: int,
    folder: Path,
    job: Mapping[str, Any],
    ranks: Ranks | None = None,
    patience: float = 600.0,
    progress: bool = False,
) -> Iterator[Samples | None]:
    """All samples on rank 0, in the order of the seeds; None on the other ranks.

        with sample_seeds(draw, "0-9999", 256, folder, job) as samples:
            if samples is not None:
                save(samples.x)

    Sample i depends on seed i alone, if `draw` gives each seed its own noise, as Sampler.run
    does: bit for bit whatever the number of ranks, to rounding whatever the batch. (Solvers that
    choose their own steps do so for a whole batch: there the batch matters.)

    draw: makes a batch. batch: seeds in each. folder: where the files of the batches go, one that
    all ranks see; they are removed when the `with` block ends well, and used again when it did
    not. job: all that the samples depend on beside seeds and batch (weights, solver, ...), as JSON
    values; files of another job are left alone. ranks: torchrun's by default. patience: seconds
    that rank 0 waits for the next file before it gives up with a RankError.
    """
    from tqdm.auto import tqdm

    seeds, given = parse_seeds(seeds), ranks
    ranks = given or Ranks.here()
    mine = batches(len(seeds), batch, ranks.rank, ranks.world)
    count = -(-len(seeds) // batch)
    what = json.dumps({"job": dict(job), "seeds": seeds, "batch": batch}, sort_keys=True)
    parts = folder / f".parts-{hashlib.sha256(what.encode()).hexdigest()[:16]}"
    if count == 1 and ranks.world == 1:
        drawn = draw(seeds, slice(0, len(seeds)))
        yield Samples(drawn.x.cpu(), seeds, drawn.nfe)
        return
    store = ranks.store(patience) if given is None and ranks.world > 1 else None
    call = next(_calls)
    if progress and ranks.rank == 0 and count < ranks.world:
        idle = f"{ranks.world - count} of {ranks.world} processes have nothing to do"
        print(f"sampling: {idle}; a smaller batch shares better", file=sys.stderr)
    slowest = 0.0
    for number, places in tqdm(mine, desc="batches", disable=not progress or ranks.rank > 0):
        if _read(parts, number, places) is None:
            begun = time.monotonic()
            _write(parts, number, draw(seeds[places], places), places)
            slowest = max(slowest, time.monotonic() - begun)
    if store is not None:
        store.set(f"sampled/{call}/{ranks.rank}", "")
    if ranks.rank:
        yield None
        return
    patience = max(patience, 10 * slowest)  # others may be slower, not so much slower
    found = _gather(parts, batches(len(seeds), batch), ranks.world, patience)
    if store is not None:  # so that none begins anew once the files are gone
        keys = [f"sampled/{call}/{rank}" for rank in range(ranks.world)]
        wait(store, keys, patience, "sampling: every batch is there, but no word from ranks ")
    assert len(found) == count
    yield Samples(torch.cat([x for x, _ in found]), seeds, max(nfe for _, nfe in found))
    shutil.rmtree(parts)


def _gather(
    parts: Path, wanted: list[tuple[int, slice]], world: int, patience: float
) -> list[tuple[Tensor, int]]:
    """The batches in order, as they come; an error when none has come for too long."""
    found: dict[int, tuple[Tensor, int]] = {}
    deadline = time.monotonic() + patience
    while True:
        for number, places in wanted:
            if number not in found and (part := _read(parts, number, places)) is not None:
                found[number] = part
                deadline = time.monotonic() + patience
        missing = [number for number, _ in wanted if number not in found]
        if not missing:
            return [found[number] for number, _ in wanted]
        if time.monotonic() > deadline:
            absent = sorted({number % world for number in missing})
            raise RankError(
                f"sampling: {len(missing)} of {len(wanted)} batches are missing and none came for "
                f"{patience:g} s; they are those of rank {', '.join(map(str, absent))}: see "
                f"whether it still runs and writes to {parts.parent}. The same command goes on "
                "from the batches that are there"
            )
        time.sleep(min(0.1, patience / 10))


def _path(parts: Path, number: int) -> Path:
    return parts / f"batch_{number:06d}.safetensors"


def _write(parts: Path, number: int, drawn: Drawn, places: slice) -> None:
    """Put a batch in its file in one go: temporary name, fsync, rename."""
    from safetensors.torch import save

    if len(drawn.x) != places.stop - places.start:
        raise ArgumentError(
            f"draw gave {len(drawn.x)} samples for {places.stop - places.start} seeds"
        )
    parts.mkdir(parents=True, exist_ok=True)
    path = _path(parts, number)
    temporary = path.with_name(f"{path.name}.{node()}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            x = drawn.x.detach().cpu().contiguous()
            file.write(save({"x": x}, metadata={"nfe": str(drawn.nfe)}))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(parts: Path, number: int, places: slice) -> tuple[Tensor, int] | None:
    """A batch of an earlier moment, and its evaluations; None if it is not there whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(_path(parts, number), framework="pt") as file:
            x, nfe = file.get_tensor("x"), int(file.metadata()["nfe"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    return (x, nfe) if len(x) == places.stop - places.start else None
