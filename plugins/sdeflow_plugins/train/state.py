"""What training changes: weights, their averages, the optimizer's memory; to a file and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sdeflow.errors import NonFiniteError

from .average import power_decay
from .recipe import Recipe


@dataclass
class State:
    """What training changes: the weights, their averages, the optimizer's memory, the step.

    shape: of one sample. network, ema, optimizer: as they are after `step` steps.
    decay: n -> d; the update of `ema` after n others is average <- d average + (1 - d) weights.
    classes: of a conditional network; 0 otherwise.
    posthoc: the power averages for post-hoc EMA by their relative width; empty if not asked for.
    bad_step: the first step with a loss or gradient that is not finite, on the training device; 0
        if there was none. From that step on nothing changes but `step`, until it is `settled`.
    """

    shape: tuple[int, ...]
    network: nn.Module
    ema: AveragedModel
    optimizer: torch.optim.Optimizer
    decay: Callable[[int], float]
    step: int = 0
    classes: int = 0
    posthoc: dict[float, AveragedModel] = field(default_factory=dict)
    bad_step: Tensor = field(default_factory=lambda: torch.tensor(0))

    @classmethod
    def fresh(
        cls, recipe: Recipe, shape: tuple[int, ...], device: torch.device, classes: int = 0
    ) -> State:
        """The state before the first step: random weights of the recipe's seed.

        classes: recipe.count_classes(dataset).
        """
        network = recipe.make_network(shape, classes).to(device)
        if len(shape) == 3 and device.type == "cuda":  # on a CPU it costs 5 to 20 %
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        widths = recipe.posthoc_widths if recipe.posthoc_every else []
        return cls(
            shape=shape,
            network=network,
            ema=AveragedModel(network),
            optimizer=torch.optim.AdamW(
                network.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
            ),
            decay=decay_of(recipe),
            classes=classes,
            posthoc={width: AveragedModel(network) for width in widths},
            bad_step=torch.zeros((), dtype=torch.long, device=device),
        )

    # ---- one step

    def note(self, finite: Tensor) -> None:
        """Remember the step in progress as bad unless `finite`; the device is not waited for."""
        first = (self.bad_step == 0) & ~finite
        self.bad_step = torch.where(first, self.step + 1, self.bad_step)

    def settled(self) -> int:
        """The first bad step, or 0; waits for the device. A bad step and those after it are taken
        back: `step` is again that of the weights."""
        if bad := int(self.bad_step):
            self.step = bad - 1
            self.bad_step.zero_()
        return bad

    def update(self, optimizer: Any, sure: bool) -> None:
        """One step of the optimizer (as Fabric wraps it) and of the averages.

        sure: whether the host knows that there is no bad step; otherwise the device decides.
        """
        good = None if sure else (self.bad_step == 0).float()
        # AdamW's fused kernel leaves all as it is where found_inf is 1, as with a GradScaler.
        self.optimizer.found_inf = None if good is None else 1 - good  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad()
        follow(self.ema.module, self.network, 1 - self.decay(self.step), good)
        for width, average in self.posthoc.items():
            follow(average.module, self.network, 1 - power_decay(width, self.step), good)
        self.step += 1

    # ---- to a file and back

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, facts) for a checkpoint; NonFiniteError where a bad step is not settled."""
        if bad := int(self.bad_step):
            raise NonFiniteError(
                f"training: step {bad} had a loss or gradient that is not finite; nothing is saved "
                "after it, the last checkpoint is good"
            )
        memory = self.optimizer.state_dict()
        tensors = {f"network.{name}": t for name, t in self.network.state_dict().items()}
        for prefix, average in self.averages().items():
            tensors |= {f"{prefix}.{name}": t for name, t in average.module.state_dict().items()}
        for index, slots in memory["state"].items():
            tensors |= {f"optimizer.{index}.{slot}": t for slot, t in slots.items()}
        return tensors, {
            "shape": list(self.shape),
            "classes": self.classes,
            "groups": memory["param_groups"],
        }

    def unpack(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Take over a checkpoint."""
        self.network.load_state_dict(under("network.", tensors))
        for prefix, average in self.averages().items():
            average.module.load_state_dict(under(f"{prefix}.", tensors))
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
        self.bad_step.zero_()

    def averages(self) -> dict[str, AveragedModel]:
        """The averages by the prefix of their tensors in a checkpoint."""
        return {"ema": self.ema, **{f"posthoc.{w}": a for w, a in self.posthoc.items()}}


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, the prefix taken off."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def decay_of(recipe: Recipe) -> Callable[[int], float]:
    """n -> d of the recipe's average, n updates having been made; the first one copies, d = 0.

    constant: d = min(ema, (1 + n)/(10 + n)): a young average forgets its random start.
    power: (1 - 1/(n + 1))^(gamma + 1), see `average`.
    """
    if recipe.ema_kind == "power":
        return lambda n: power_decay(recipe.ema_width, n)
    return lambda n: min(recipe.ema, (1 + n) / (10 + n)) if n else 0.0


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, weight: float, good: Tensor | None) -> None:
    """average += weight (network - average), if `good` is None or 1 (a tensor on the device).

    Buffers are copied. In place of AveragedModel's own update, which asks the device how many
    there were.
    """
    own: list[Tensor] = list(average.parameters())
    new: list[Tensor] = list(network.parameters())
    if good is None:
        torch._foreach_lerp_(own, new, weight)
    else:
        gaps = torch._foreach_sub(new, own)
        torch._foreach_mul_(gaps, weight * good)
        torch._foreach_add_(own, gaps)
    for buffer, value in zip(average.buffers(), network.buffers(), strict=True):
        buffer.copy_(value if good is None else torch.where(good > 0, value, buffer))
