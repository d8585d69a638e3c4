"""Sharded weights: FSDP2 on Lightning Fabric, on CUDA (nccl) and on CPU (gloo).

Each rank holds its rows of every weight, of its average and of the optimizer's memory; the whole
weights of one block at a time are gathered when it computes.
Source: Rajbhandari et al. (2020), ZeRO stage 3; Zhao et al. (2023); torch's `fully_shard`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning_fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sdeflow.errors import ArgumentError

from .state import State


class ShardedStrategy(ModelParallelStrategy):
    """Fabric's strategy for modules that `shard` has sharded already, over all ranks."""

    def __init__(self, world: int, timeout: timedelta) -> None:
        super().__init__(
            _check_sharded, data_parallel_size=world, tensor_parallel_size=1, timeout=timeout
        )

    def clip_gradients_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        """The norm over all ranks' shards, as an ordinary tensor."""
        norm = super().clip_gradients_norm(*args, **kwargs)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm


def shard(state: State, mesh: DeviceMesh) -> None:
    """Shard the weights of a state, their averages and the optimizer's memory, in place.

    state: a fresh one; a checkpoint is taken over afterwards. mesh: of one dimension, the ranks.
    Each element of a ModuleList is gathered on its own, what is left at once.
    """
    if state.optimizer.state:
        raise ArgumentError(f"shard: the state has made {state.step} steps; shard it before them")
    old = list(state.network.parameters())
    if any(p.ndim == 0 for p in old):
        raise ArgumentError(
            "strategy='fsdp' shards weights by their rows, and the network has one without rows, a "
            "single number; use ddp, or a weight of shape (1,)"
        )
    for module in (state.network, *(average.module for average in state.averages().values())):
        module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        for block in _blocks(module):
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
    new = dict(zip(map(id, old), state.network.parameters(), strict=True))
    for group in state.optimizer.param_groups:
        group["params"] = [new[id(p)] for p in group["params"]]
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors put together, on the host of every rank; all ranks have to call this."""
    found = {}
    for name in sorted(tensors):  # one order on all ranks: each waits for the others
        tensor = tensors[name]
        found[name] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
    return found


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The elements of ModuleLists, the outermost ones."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _blocks(child)


def _check_sharded(module: nn.Module, _: DeviceMesh) -> nn.Module:
    if not any(isinstance(p, DTensor) for p in module.parameters()):
        raise ArgumentError(
            "strategy='fsdp': the network is not sharded; call shard(state, mesh) before training"
        )
    return module
