"""The order of the data, a function of (seed, step, place) alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from .recipe import Recipe


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


def key(*numbers: int) -> int:
    """One seed from several numbers, without visible relation between neighbours."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
