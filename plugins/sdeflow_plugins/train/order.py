"""The order of the data and the noise of a step: functions of (seed, step, place) alone.

A step has one global batch of places 0..batch_size - 1. Rank r of w has the places r, r + w, ...,
and evaluates them in `accumulate` parts of one size. Indices and noise belong to the place, so
they are the same for every number of processes and parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from sdeflow.loss import sample_times
from sdeflow.sde import GaussianSDE

from .recipe import Recipe


class Batches(Sampler[list[int]]):
    """The indices of each part of each batch from step `start` on.

    All batches together read one endless row: a shuffle of the data set after another. A data set
    smaller than a batch is in it more than once.
    """

    def __init__(self, n: int, recipe: Recipe, start: int, rank: int = 0, world: int = 1) -> None:
        self.n, self.recipe, self.start = n, recipe, start
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return max(0, self.recipe.steps - self.start) * self.recipe.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        size, epoch, order = self.recipe.batch_size, -1, np.arange(0)
        for step in range(self.start, self.recipe.steps):
            places = np.arange(step * size + self.rank, (step + 1) * size, self.world)
            epochs, batch = places // self.n, np.empty_like(places)
            for each in range(int(epochs[0]), int(epochs[-1]) + 1):
                if each != epoch:
                    epoch = each
                    order = np.random.default_rng([self.recipe.seed, epoch]).permutation(self.n)
                here = epochs == epoch
                batch[here] = order[places[here] % self.n]
            for part in np.split(batch, self.recipe.accumulate):
                yield part.tolist()


def rows(recipe: Recipe, part: int, rank: int = 0, world: int = 1) -> slice:
    """The places in the global batch that a rank evaluates in one part, in the order of Batches."""
    span = recipe.batch_size // recipe.accumulate
    return slice(part * span + rank, (part + 1) * span, world)


@dataclass(frozen=True)
class Noise:
    """What is random in a step: times (B,) in float64, unit normals (B, *), uniforms (B,)."""

    t: Tensor
    normals: Tensor
    uniforms: Tensor

    @classmethod
    def draw(
        cls, recipe: Recipe, sde: GaussianSDE, shape: tuple[int, ...], generator: torch.Generator
    ) -> Noise:
        """The noise of a global batch, on the generator's device; the times are stratified."""
        n, device = recipe.batch_size, generator.device
        t = sample_times(sde, n, recipe.times, generator=generator)
        normals = torch.randn((n, *shape), generator=generator, device=device)
        return cls(t, normals, torch.rand(n, generator=generator, device=device))

    def __getitem__(self, places: slice) -> Noise:
        """That of some places of the batch."""
        return Noise(self.t[places], self.normals[places], self.uniforms[places])


class Labelled(Dataset[tuple[Tensor, Tensor]]):
    """A data set with its labels: item i is (dataset[i], dataset.labels[i])."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.labels = torch.as_tensor(dataset.labels)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.dataset[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """A whole batch at one go, where the data set can."""
        whole = getattr(self.dataset, "__getitems__", None)
        samples = whole(indices) if whole else [self.dataset[index] for index in indices]
        return list(zip(samples, self.labels[torch.as_tensor(indices)], strict=True))


def key(*numbers: int) -> int:
    """One seed from several numbers, without visible relation between neighbours."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
