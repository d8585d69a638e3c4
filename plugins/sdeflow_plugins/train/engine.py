"""The engine: Lightning Fabric for a recipe, in one process or in those that torchrun started."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import gc
import logging
import os
from collections.abc import Iterator
from datetime import timedelta
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from sdeflow.errors import ArgumentError

from ..ranks import Ranks
from .recipe import Recipe
from .state import State

if TYPE_CHECKING:
    from lightning_fabric import Fabric

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others in a step or for a checkpoint of rank 0."""


def make_fabric(recipe: Recipe) -> Fabric:
    """Lightning Fabric for the recipe's device, precision and strategy, for all ranks.

    One process, or the processes of torchrun: with DDP (each holds all weights and computes its
    rows of the batch) over gloo on CPUs and nccl on GPUs, one GPU a process; or with FSDP2 (each
    holds its share of the weights). What the recipe asks for and torchrun's environment does not
    give is an error before any process waits for another.
    """
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments import (
            LightningEnvironment,
            TorchElasticEnvironment,
        )
    except ImportError as error:
        raise ArgumentError(
            f"training needs lightning-fabric ({error}); pip install 'sdeflow[images]'"
        ) from error
    ranks = Ranks.here()
    launched = TorchElasticEnvironment.detect()
    if recipe.strategy != "auto" and not launched:
        raise ArgumentError(
            f"strategy={recipe.strategy!r} is for several processes and this is the only one: "
            f"start it with torchrun --nproc-per-node {os.cpu_count()} -m sdeflow train ..., "
            "or leave strategy at auto"
        )
    cuda = torch.cuda.is_available() and recipe.device != "cpu"
    if cuda and ranks.local_world > torch.cuda.device_count():
        raise ArgumentError(
            f"torchrun started {ranks.local_world} processes on this machine, which has "
            f"{torch.cuda.device_count()} CUDA devices: a process needs one of its own; lower "
            "--nproc-per-node, or use device=cpu"
        )
    precision = recipe.precision
    if precision == "auto":  # in bf16 the numbers depend on how a batch is split: asked for on CPUs
        precision = "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
    ranks.agree(
        {
            "device": "cuda" if cuda else "cpu",
            "precision": precision,
            "torch": torch.__version__,
            "sdeflow": version("sdeflow"),
            **{f"recipe.{name}": value for name, value in dataclasses.asdict(recipe).items()},
        }
    )
    with _quiet():
        fabric = Fabric(
            accelerator="cuda" if cuda else "cpu",
            devices=ranks.local_world,
            num_nodes=ranks.nodes,
            precision="bf16-mixed" if precision == "bf16" else "32-true",
            strategy=_strategy(recipe, ranks),
            plugins=[TorchElasticEnvironment() if launched else LightningEnvironment()],
        )
        fabric.launch()
    if launched:
        atexit.unregister(_disconnect)  # once, however many fabrics there are
        atexit.register(_disconnect)
    if fabric.world_size != ranks.world:
        raise ArgumentError(
            f"torchrun started {ranks.world} processes, of which the engine found "
            f"{fabric.world_size}; start it with torchrun alone, without LT_ variables"
        )
    return fabric


def distribute(state: State, fabric: Fabric) -> None:
    """Shard a fresh state where the strategy does so (FSDP); elsewhere do nothing.

    To be called before a checkpoint is taken over.
    """
    from lightning_fabric.strategies import ModelParallelStrategy

    if isinstance(fabric.strategy, ModelParallelStrategy):
        from .fsdp import shard

        shard(state, fabric.strategy.device_mesh["data_parallel"])


def describe(fabric: Fabric) -> str:
    """How many processes train, where, on what and by which strategy: one line."""
    from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy

    ranks, strategy = Ranks.here(), fabric.strategy
    device = fabric.device.type
    if device == "cuda":
        device = torch.cuda.get_device_name(fabric.device)
    precision = "bf16" if "bf16" in str(getattr(strategy.precision, "precision", "")) else "fp32"
    line = f"{ranks}, {precision} on {device}"
    if isinstance(strategy, DDPStrategy):
        return f"{line}, DDP over {strategy.process_group_backend}"
    if isinstance(strategy, ModelParallelStrategy):
        return f"{line}, FSDP over {strategy.process_group_backend}"
    return line


def close(fabric: Fabric) -> None:
    """Wait for all ranks: none leaves, or goes on to something else, while another needs it.

    The connection stays for what comes next, since torchrun's store still knows the addresses of
    this one and a second would be given those; it ends with the program.
    """
    fabric.barrier()


def _disconnect() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # gloo's threads end with the last reference to them


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Fabric's notes from every rank; `describe` says the same in one line."""
    logger = logging.getLogger("lightning_fabric")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _strategy(recipe: Recipe, ranks: Ranks) -> Any:
    """What Fabric is given: the strategy of several processes, or auto for one."""
    from lightning_fabric.strategies import DDPStrategy

    if recipe.strategy == "fsdp":
        try:
            from .fsdp import ShardedStrategy
        except ImportError as error:
            raise ArgumentError(
                f"strategy='fsdp' needs torch >= 2.9 (here {torch.__version__}: {error})"
            ) from error
        return ShardedStrategy(ranks.world, PATIENCE)
    if ranks.world > 1 or recipe.strategy == "ddp":
        return DDPStrategy(timeout=PATIENCE)
    return "auto"
