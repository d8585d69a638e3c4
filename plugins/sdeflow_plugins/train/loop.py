"""The training loop, a generator: denoising score matching on Lightning Fabric.

Data order, times and noise are functions of (seed, step), so that a resumed run repeats the run
that was never stopped, bit for bit on one device. The loop prints and writes nothing; what to do
with its records is the caller's `for`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset, Sampler

from sdeflow.errors import ArgumentError, NonFiniteError
from sdeflow.loss import score_matching

from .recipe import Recipe

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Record:
    """One step of training, as it went."""

    step: int
    loss: float
    grad_norm: float
    lr: float


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


def make_fabric(recipe: Recipe) -> Fabric:
    """Lightning Fabric for the recipe's device and precision; under torchrun, for all ranks."""
    try:
        from lightning_fabric import Fabric
    except ImportError as error:
        raise ArgumentError(
            f"training needs lightning-fabric ({error}); pip install 'sdeflow[images]'"
        ) from error
    cuda = torch.cuda.is_available() and recipe.device != "cpu"
    precision = recipe.precision
    if precision == "auto":  # on CPUs bf16 gave 15 % on one core, less than nothing on two
        precision = "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
    fabric = Fabric(
        accelerator="cuda" if cuda else "cpu",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", 1)),
        precision="bf16-mixed" if precision == "bf16" else "32-true",
    )
    fabric.launch()
    return fabric


def training(recipe: Recipe, dataset: Dataset, state: State, fabric: Fabric) -> Iterator[Record]:
    """Train from state.step to recipe.steps; one Record per step, made after it.

    `state` is changed in place and may be saved whenever the generator waits. A loss or gradient
    that is not finite raises NonFiniteError before it touches the weights or their average.
    """
    world, rank = fabric.world_size, fabric.global_rank
    if recipe.batch_size % world:
        raise ArgumentError(
            f"batch_size={recipe.batch_size} must be a multiple of the {world} processes"
        )
    batches = Batches(len(dataset), recipe, state.step, rank, world)  # type: ignore[arg-type]
    loader: DataLoader[Tensor] = DataLoader(
        dataset, batch_sampler=batches, num_workers=recipe.workers, generator=torch.Generator()
    )
    model, optimizer = fabric.setup(state.network, state.optimizer)
    denoiser = recipe.make_denoiser(model)
    forked = [fabric.device] if fabric.device.type == "cuda" else []
    model.train()
    for x0 in loader:
        x0 = x0.to(fabric.device)
        if x0.ndim == 4:
            x0 = x0.contiguous(memory_format=torch.channels_last)
        lr = learning_rate(recipe, state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        seed = key(recipe.seed, state.step, rank)
        with torch.random.fork_rng(forked):  # for dropout, which knows the global generator only
            torch.manual_seed(seed)
            loss = score_matching(
                denoiser,
                x0,
                times=recipe.times,
                weighting=recipe.weighting,
                generator=torch.Generator().manual_seed(seed),
            )
            fabric.backward(loss)
        norm = fabric.clip_gradients(
            model, optimizer, max_norm=recipe.clip, error_if_nonfinite=False
        )
        record = Record(state.step + 1, loss.item(), norm.item(), lr)  # type: ignore[union-attr]
        if not (math.isfinite(record.loss) and math.isfinite(record.grad_norm)):
            optimizer.zero_grad()
            raise NonFiniteError(
                f"training: step {record.step} has loss {record.loss} and gradient norm "
                f"{record.grad_norm}; the weights are still those of step {state.step}. Lower "
                f"lr={recipe.lr} or clip={recipe.clip}, or look for NaN in data={recipe.data!r}"
            )
        optimizer.step()
        optimizer.zero_grad()
        state.ema.update_parameters(state.network)
        state.step += 1
        yield record


class Batches(Sampler[list[int]]):
    """The indices of each batch from step `start` on, a function of (seed, step) alone.

    All batches together read one endless row: a shuffle of the data set after another. A rank
    takes every world-th index of each.
    """

    def __init__(self, n: int, recipe: Recipe, start: int, rank: int = 0, world: int = 1) -> None:
        self.n, self.recipe, self.start = n, recipe, start
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return max(0, self.recipe.steps - self.start)

    def __iter__(self) -> Iterator[list[int]]:
        size, epoch, order = self.recipe.batch_size, -1, np.arange(0)
        for step in range(self.start, self.recipe.steps):
            batch = []
            for place in range(step * size + self.rank, (step + 1) * size, self.world):
                if place // self.n != epoch:
                    epoch = place // self.n
                    order = np.random.default_rng([self.recipe.seed, epoch]).permutation(self.n)
                batch.append(int(order[place % self.n]))
            yield batch


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate of step `step`, counted from 0: a linear rise, then a cosine or a constant."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    if recipe.schedule == "constant":
        return recipe.lr
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def moving_average(decay: float) -> Any:
    """The update of AveragedModel: average <- d average + (1 - d) weights, d = decay once warm.

    After n updates d = min(decay, (1 + n)/(10 + n)): a young average forgets its random start.
    """

    @torch.no_grad()
    def update(average: list[Tensor], weights: list[Tensor], n: Tensor | int) -> None:
        d = min(decay, (1 + int(n)) / (10 + int(n)))
        torch._foreach_lerp_(average, weights, 1 - d)

    return update


def key(*numbers: int) -> int:
    """One seed from several numbers, without visible relation between neighbours."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
