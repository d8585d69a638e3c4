"""The training loop, a generator: denoising score matching on Lightning Fabric.

Data order, times, noise and dropped labels are functions of (seed, step, place in the batch), so
that a resumed run repeats the run that was never stopped, bit for bit on one device. The loop
prints and writes nothing; what to do with its records is the caller's `for`.

The host never waits for a GPU within a step: a loss or gradient that is not finite is noted on the
device, which from then on leaves weights, average and optimizer as they are, and the host looks
every `log_every` steps and before each checkpoint. On a CPU it looks at every step.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sdeflow.denoiser import Denoiser
from sdeflow.errors import ArgumentError, NonFiniteError, ShapeError
from sdeflow.loss import denoising_loss

from .order import Batches, Labelled, Noise, key, rows
from .recipe import Recipe
from .state import State

if TYPE_CHECKING:
    from lightning_fabric import Fabric

BACKEND = "inductor"
"""Of torch.compile, where the recipe asks for it."""


class Reading:
    """A field of a dataclass that takes a number or a tensor of one, and is read as a float.

    Reading a tensor waits for its device; storing it does not.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"_{name}"

    def __get__(self, record: Any, owner: type | None = None) -> float:
        if record is None:
            raise AttributeError("no default")  # so that the dataclass asks for a value
        return float(getattr(record, self.name))

    def __set__(self, record: Any, value: float | Tensor) -> None:
        object.__setattr__(record, self.name, value)


@dataclass(frozen=True)
class Record:
    """One step of training, as it went: loss and gradient norm are those of all processes."""

    step: int
    loss: Reading = Reading()
    grad_norm: Reading = Reading()
    lr: Reading = Reading()


@dataclass(frozen=True)
class Batch:
    """What a loss is given: one rank's part of a batch, on the training device.

    x0: clean data (B, *). t, noise: the step's times (B,) and unit normals (B, *).
    label: classes (B,), some of them replaced by K, "no class"; None in unconditional training.
    generator: for whatever else is random in a loss; a function of (seed, step, part, rank).
    """

    x0: Tensor
    t: Tensor
    noise: Tensor
    label: Tensor | None
    generator: torch.Generator


Loss = Callable[[Denoiser, Batch], Tensor]
"""(denoiser, batch) -> the mean loss of the batch, a scalar. The denoiser's network already has
the batch's labels, and runs through Fabric: call it, or `denoiser.net(x, t)`, and nothing else."""


def training(
    recipe: Recipe,
    dataset: Dataset,
    state: State,
    fabric: Fabric,
    loss: Loss | None = None,
) -> Iterator[Record]:
    """Train from state.step to recipe.steps; one Record per step, made after it.

    loss: what is minimised; denoising score matching with the recipe's weighting unless given.
        With accumulation it is called once for each part, and the parts' means are averaged.
    `state` is changed in place and may be saved whenever the generator waits. A loss or gradient
    that is not finite raises NonFiniteError, and never touches the weights or their average.
    """
    world, rank, device = fabric.world_size, fabric.global_rank, fabric.device
    parts = iter(_loader(recipe, dataset, state, fabric))
    loss = loss or _score_matching(recipe)
    network = _compiled(state.network) if recipe.compile else state.network
    model, optimizer = fabric.setup(network, state.optimizer)
    model.train()
    denoiser = recipe.make_denoiser(model)
    generator = torch.Generator(device)
    forked = [device] if device.type == "cuda" else []
    pending: list[Record] = []
    for step in range(state.step, recipe.steps):
        lr = learning_rate(recipe, step)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        generator.manual_seed(key(recipe.seed, step))
        noise = Noise.draw(recipe, denoiser.sde, state.shape, generator)
        total = torch.zeros((), device=device)
        for part in range(recipe.accumulate):
            seed = key(recipe.seed, step, part, rank)
            own = noise[rows(recipe, part, rank, world)]
            batch = _batch(recipe, state, next(parts), own, generator.manual_seed(seed))
            waits = part < recipe.accumulate - 1
            with torch.random.fork_rng(forked), fabric.no_backward_sync(model, enabled=waits):
                _seed_dropout(seed, device)
                mean = loss(_with_label(denoiser, batch.label), batch)
                if mean.ndim:
                    raise ShapeError(
                        f"loss returned shape {tuple(mean.shape)}; it must be one number, the mean"
                    )
                fabric.backward(mean / recipe.accumulate)
            total += mean.detach() / recipe.accumulate
        if world > 1:  # the same number everywhere: all processes stop at the same step
            total = cast(Tensor, fabric.all_reduce(total, reduce_op="mean"))
        norm = fabric.clip_gradients(
            model, optimizer, max_norm=recipe.clip, error_if_nonfinite=False
        )
        norm = cast(Tensor, norm)
        record = Record(step + 1, total, norm, lr)
        pending.append(record)
        state.note(total.isfinite() & norm.isfinite())
        looked = looks(recipe, step + 1, device)
        if looked:
            if bad := state.settled():
                optimizer.zero_grad()
                raise _not_finite(recipe, next(r for r in pending if r.step == bad))
            pending.clear()
        state.update(optimizer, sure=looked)
        yield record


def looks(recipe: Recipe, step: int, device: torch.device) -> bool:
    """Whether the host looks for a bad step before the update that makes `step`."""
    last = step == recipe.steps
    stops = (recipe.log_every, recipe.save_every)
    return device.type == "cpu" or last or any(step % every == 0 for every in stops)


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate of step `step`, counted from 0: a linear rise, then a cosine or a constant."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    if recipe.schedule == "constant":
        return recipe.lr
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def _loader(recipe: Recipe, dataset: Dataset, state: State, fabric: Fabric) -> DataLoader:
    """The parts of batches from state.step on; its workers live as long as the run."""
    world = fabric.world_size
    if recipe.batch_size % (world * recipe.accumulate):
        raise ArgumentError(
            f"batch_size={recipe.batch_size} must be a multiple of {world * recipe.accumulate}, "
            f"{world} processes times accumulate={recipe.accumulate}"
        )
    n = len(dataset)  # type: ignore[arg-type]
    if not n:
        raise ArgumentError(f"data={recipe.data!r} is empty; training needs at least one sample")
    classes = recipe.count_classes(dataset)
    if classes != state.classes:
        raise ArgumentError(
            f"the data set has {classes} classes, the network {state.classes}; make the state with "
            "State.fresh(recipe, shape, device, recipe.count_classes(dataset))"
        )
    return DataLoader(
        Labelled(dataset) if classes else dataset,
        batch_sampler=Batches(n, recipe, state.step, fabric.global_rank, world),
        num_workers=recipe.workers,
        pin_memory=fabric.device.type == "cuda",
        generator=torch.Generator(),  # else the global one moves
    )


def _compiled(network: nn.Module) -> Any:
    """The network, compiled at its first call; Fabric takes that off and does it around DDP."""
    compilers = (os.environ.get("CXX", ""), "g++", "clang++", "cl")
    if BACKEND == "inductor" and not any(map(shutil.which, compilers)):
        raise ArgumentError(
            "compile=True needs a C++ compiler and found none (g++, clang++, $CXX); install one, "
            "or leave compile out"
        )
    return torch.compile(network, backend=BACKEND)


def _batch(
    recipe: Recipe, state: State, loaded: Any, noise: Noise, generator: torch.Generator
) -> Batch:
    """What was loaded and drawn, on the device and checked, a share of the labels dropped."""
    x0, label = loaded if state.classes else (loaded, None)
    if x0.shape[1:] != state.shape or not x0.is_floating_point():
        raise ShapeError(
            f"data={recipe.data!r} gives samples {tuple(x0.shape[1:])} {x0.dtype}; they must be "
            f"{state.shape} in floating point (images: x.float() / 127.5 - 1)"
        )
    device = noise.t.device
    x0, normals = x0.to(device, non_blocking=True), noise.normals.to(x0.dtype)
    if x0.ndim == 4 and device.type == "cuda":
        x0 = x0.contiguous(memory_format=torch.channels_last)
        normals = normals.contiguous(memory_format=torch.channels_last)
    if label is not None:
        dropped = noise.uniforms < recipe.label_dropout
        label = label.to(device, non_blocking=True).masked_fill(dropped, state.classes)
    return Batch(x0, noise.t, normals, label, generator)


def _seed_dropout(seed: int, device: torch.device) -> None:
    """Seed the global generators, the only ones that dropout knows.

    torch.manual_seed would, on a CPU, note down a stack trace for a CUDA that never comes.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _with_label(denoiser: Denoiser, label: Tensor | None) -> Denoiser:
    """The denoiser of given classes."""
    if label is None:
        return denoiser
    net: Callable[..., Tensor] = denoiser.net
    return replace(denoiser, net=partial(net, label=label))


def _score_matching(recipe: Recipe) -> Loss:
    """The mean of `denoising_loss` with the recipe's weighting."""
    return lambda denoiser, batch: denoising_loss(
        denoiser, batch.x0, batch.t, batch.noise, recipe.weighting
    ).mean()


def _not_finite(recipe: Recipe, record: Record) -> NonFiniteError:
    return NonFiniteError(
        f"training: step {record.step} has loss {record.loss} and gradient norm "
        f"{record.grad_norm}; the weights are still those of step {record.step - 1}. Lower "
        f"lr={recipe.lr} or clip={recipe.clip}, or look for NaN in data={recipe.data!r}"
    )
