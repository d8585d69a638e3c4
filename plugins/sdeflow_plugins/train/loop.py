"""The training loop, a generator: denoising score matching on Lightning Fabric.

Data order, times and noise are functions of (seed, step), so that a resumed run repeats the run
that was never stopped, bit for bit on one device. The loop prints and writes nothing; what to do
with its records is the caller's `for`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sdeflow.errors import ArgumentError, NonFiniteError
from sdeflow.loss import score_matching

from .order import Batches, key
from .recipe import Recipe
from .state import State

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Record:
    """One step of training, as it went."""

    step: int
    loss: float
    grad_norm: float
    lr: float


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


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate of step `step`, counted from 0: a linear rise, then a cosine or a constant."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    if recipe.schedule == "constant":
        return recipe.lr
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
