"""Noise: unit normals for the interval [t, s], each sample with a stream of its own.

The contract of a noise source: `noise(t, s)` returns unit normals for one Wiener increment over
[t, s], fresh at every call. Any callable will do; `SeededNoise` is what an integer seed means.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .errors import ArgumentError, whole

Noise = Callable[[Tensor, Tensor], Tensor]
Seed = int | Sequence[int]


class SeededNoise:
    """Unit normals that are a function of (seed, call, sample, component) alone.

    seed: one integer for the batch, or a sequence of B integers, one a sample. Sample i is a
        function of (seed, i), or of its own seed, so that the first 8 of a batch of 64 are the
        batch of 8, bit for bit; a sample with seed k in a sequence is sample 0 of seed k.
    shape: of one increment, (B, *). dtype: drawn in float64 for float64, else in float32 and cast.
    device: where they are sent; they are drawn on the host, so that a seed gives the same
        samples on any device. No global generator is read or moved.
    first: the number of the first call; 0 draws what `start` does.
    """

    def __init__(
        self,
        seed: Seed,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        first: int = 1,
    ) -> None:
        self.seed, self.shape = check_seed(seed, shape[0]), tuple(shape)
        self.dtype, self.device = dtype, torch.device(device)
        self.call = first
        self._generator = torch.Generator()

    def __call__(self, t: Tensor, s: Tensor) -> Tensor:
        self.call += 1
        return self.draw(self.call - 1)

    def draw(self, call: int) -> Tensor:
        """The unit normals of the given call, of `shape`."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        if isinstance(self.seed, int):
            z = self._fill(self.seed, call, self.shape, wide)
        else:
            one = (1, *self.shape[1:])
            z = torch.cat([self._fill(seed, call, one, wide) for seed in self.seed])
        return z.to(device=self.device, dtype=self.dtype, non_blocking=True)

    def _fill(self, seed: int, call: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel()
        # torch fills in blocks of 16 and redraws an incomplete last one: whole blocks make a
        # short batch the beginning of a long one.
        flat = torch.empty(-(-size // 16) * 16, dtype=dtype)
        flat.normal_(generator=self._generator.manual_seed(_stream(seed, call)))
        return flat[:size].view(shape)


def start(seed: Seed, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The unit normals that x_T is made of: call 0 of the seed's stream."""
    return SeededNoise(seed, shape, dtype, device).draw(0)


def fresh_seed() -> int:
    """A seed from the operating system; torch's generators are left alone."""
    return secrets.randbits(31)


def check_seed(seed: Seed, batch: int) -> int | tuple[int, ...]:
    """The seed as an int or a tuple of `batch` ints, each in [0, 2^63)."""

    def one(value: object) -> int:
        number = whole(value)
        if number is None:
            raise ArgumentError(f"seed={value!r} must be a whole number in [0, 2^63)")
        if not 0 <= number < 2**63:
            raise ArgumentError(f"seed={number} must be in [0, 2^63)")
        return number

    if hasattr(seed, "tolist"):  # numpy and torch arrays, and their scalars
        seed = seed.tolist()
    if isinstance(seed, str) or not isinstance(seed, Sequence):
        return one(seed)
    if len(seed) != batch:
        raise ArgumentError(
            f"seed has {len(seed)} entries for a batch of {batch}; give one a sample"
        )
    return tuple(one(value) for value in seed)


def _stream(seed: int, call: int) -> int:
    """32 bits for the generator, which uses no more. Call 0 keeps small seeds as they are, so
    that no two of them begin alike; later calls are hashed (splitmix64)."""
    if call == 0 and seed < 2**32:
        return seed
    z = (seed + call * 0x9E3779B97F4A7C15) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (z ^ (z >> 31)) >> 32
