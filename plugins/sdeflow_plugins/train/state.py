"""What training changes: weights, their average, the optimizer's memory; to a file and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .recipe import Recipe


@dataclass
class State:
    """What training changes: the weights, their moving average, the optimizer's memory, the step.

    shape: of one sample. step: how many steps have been made.
    """

    shape: tuple[int, ...]
    network: nn.Module
    ema: AveragedModel
    optimizer: torch.optim.Optimizer
    step: int = 0

    @classmethod
    def fresh(cls, recipe: Recipe, shape: tuple[int, ...], device: torch.device) -> State:
        """The state before the first step: random weights of the recipe's seed."""
        network = recipe.make_network(shape).to(device)
        if len(shape) == 3:
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        average = AveragedModel(network, multi_avg_fn=moving_average(recipe.ema))
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
        )
        return cls(shape, network, average, optimizer)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, facts) for a checkpoint."""
        memory = self.optimizer.state_dict()
        tensors = {f"network.{name}": t for name, t in self.network.state_dict().items()}
        tensors |= {f"ema.{name}": t for name, t in self.ema.module.state_dict().items()}
        for index, slots in memory["state"].items():
            tensors |= {f"optimizer.{index}.{slot}": t for slot, t in slots.items()}
        return tensors, {
            "shape": list(self.shape),
            "groups": memory["param_groups"],
            "n_averaged": int(self.ema.n_averaged),
        }

    def unpack(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Take over a checkpoint."""
        self.network.load_state_dict(under("network.", tensors))
        self.ema.module.load_state_dict(under("ema.", tensors))
        self.ema.n_averaged.fill_(facts["n_averaged"])
        slots: dict[int, dict[str, Tensor]] = {}
        parameters = list(self.network.parameters())
        for name, tensor in under("optimizer.", tensors).items():
            index, slot = name.split(".")
            like = parameters[int(index)]
            if tensor.shape == like.shape:  # in the parameter's memory format, as it was
                tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
            slots.setdefault(int(index), {})[slot] = tensor
        groups = [{**group, "betas": tuple(group["betas"])} for group in facts["groups"]]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        self.step = step


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, the prefix taken off."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def moving_average(decay: float) -> Any:
    """The update of AveragedModel: average <- d average + (1 - d) weights, d = decay once warm.

    After n updates d = min(decay, (1 + n)/(10 + n)): a young average forgets its random start.
    """

    @torch.no_grad()
    def update(average: list[Tensor], weights: list[Tensor], n: Tensor | int) -> None:
        d = min(decay, (1 + int(n)) / (10 + int(n)))
        torch._foreach_lerp_(average, weights, 1 - d)

    return update
