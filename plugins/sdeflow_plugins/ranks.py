"""The processes of a job: how many there are, and which one this is, as torchrun tells them."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sdeflow.errors import ArgumentError, SdeflowError

if TYPE_CHECKING:
    from torch.distributed import Store

OTHERS = {
    # how many processes     which this is           who sets them
    "SLURM_STEP_NUM_TASKS": ("SLURM_PROCID", "srun"),
    "OMPI_COMM_WORLD_SIZE": ("OMPI_COMM_WORLD_RANK", "mpirun"),
    "PMI_SIZE": ("PMI_RANK", "mpiexec"),
}
"""Launchers whose processes do not know of each other unless torchrun runs inside them."""

_calls = itertools.count()


class RankError(SdeflowError, RuntimeError):
    """A process of the job is missing, or does not do what the others do."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of its job; by default it is alone.

    rank: 0..world-1, over all machines. world: the number of processes. local_rank, local_world:
    the same on this machine. nodes: the number of machines.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    nodes: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """What torchrun says of this process; alone without torchrun.

        Several processes that another launcher started are refused: each would take itself for
        the only one.
        """
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            _refuse_other_launchers()
            return cls()
        ranks = cls(
            rank=_number("RANK"),
            world=_number("WORLD_SIZE"),
            local_rank=_number("LOCAL_RANK"),
            local_world=_number("LOCAL_WORLD_SIZE"),
            nodes=_number("GROUP_WORLD_SIZE"),
        )
        if ranks.nodes * ranks.local_world != ranks.world:
            raise ArgumentError(
                f"torchrun runs {ranks.world} processes on {ranks.nodes} machines, "
                f"{ranks.local_world} of them here; give every machine the same --nproc-per-node"
            )
        return ranks

    def store(self, patience: float) -> Store:
        """torchrun's store of keys and values, which all ranks share. patience: in seconds."""
        from torch.distributed import rendezvous

        limit = timedelta(seconds=patience)
        return next(rendezvous("env://", self.rank, self.world, timeout=limit))[0]

    def agree(self, facts: Mapping[str, Any], patience: float = 120.0) -> None:
        """An error on every rank unless all of them come here, with the same facts (JSON values).

        To be called by all ranks alike, before they wait for each other in ways that can hang.
        """
        if self.world == 1:
            return
        store, call = self.store(patience), next(_calls)
        keys = [f"agree/{call}/{rank}" for rank in range(self.world)]
        store.set(keys[self.rank], json.dumps(dict(facts)))
        wait(store, keys, patience, "no word from ranks ")
        told = [json.loads(store.get(key)) for key in keys]
        names = [
            name for name in told[0] if any(other.get(name) != told[0][name] for other in told)
        ]
        if names:
            lines = [
                f"{name}: " + ", ".join(f"rank {k} {v.get(name)!r}" for k, v in enumerate(told))
                for name in names
            ]
            raise RankError("the processes do not agree:\n  " + "\n  ".join(lines))

    def __str__(self) -> str:
        if self.world == 1:
            return "1 process"
        where = "1 machine" if self.nodes == 1 else f"{self.nodes} machines"
        return f"{self.world} processes on {where}"


def wait(store: Store, keys: Sequence[str], patience: float, what: str) -> None:
    """Until the keys are set; otherwise an error with the ranks, which end the missing keys."""
    try:
        store.wait(list(keys), timedelta(seconds=patience))
    except RuntimeError as error:
        absent = [key.rsplit("/", 1)[1] for key in keys if not store.check([key])]
        raise RankError(
            f"{what}{', '.join(absent)} for {patience:g} s: see whether they still run"
        ) from error


def _number(name: str) -> int:
    """A whole number that torchrun sets."""
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise ArgumentError(f"the environment has {name}={value!r}; torchrun sets a whole number")
    return int(value)


def _refuse_other_launchers() -> None:
    """An error where another launcher started this process as one of several."""
    found = {size: by for size, (_, by) in OTHERS.items()} | {"WORLD_SIZE": "the environment"}
    for size, by in found.items():
        value = os.environ.get(size, "1")
        rank = OTHERS.get(size, ("RANK", ""))[0]
        if value.isdecimal() and int(value) > 1 and rank in os.environ:
            raise ArgumentError(
                f"{by} says that this is process {os.environ[rank]} of {value} ({size}), but "
                "torchrun did not start it, so that each would work alone; start them with "
                f"torchrun --nproc-per-node {value} -m sdeflow ..., on several machines also with "
                "--nnodes and --rdzv-endpoint, or unset the variable"
            )
