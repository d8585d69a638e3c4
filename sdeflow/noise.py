"""Noise: unit normals for the interval [t, s], each sample with a stream of its own.

The contract of a noise source: `noise(t, s)` returns unit normals for one Wiener increment over
[t, s], fresh at every call. Any callable will do; `SeededNoise` is what an integer seed means.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .errors import ArgumentError, whole

Noise = Callable[[Tensor, Tensor], Tensor]
Seed = int | Sequence[int]

_SMALL, _TILE, _TILES, _CALLS = 64, 32, 128, 25
"""A block is at most 128 tiles of 32 numbers (of one sample at least, and of 64 numbers at most),
for 25 calls: steps come in round numbers."""

_NOTHING: list[Tensor | None] = [None] * _CALLS
_BLOCKS = 1 << 40
"""The streams of blocks are numbered from here: no call gets so far."""


class SeededNoise:
    """Unit normals that are a function of (seed, call, sample, component) alone.

    seed: one integer for the batch, or a sequence of B integers, one a sample. Sample i is a
        function of (seed, i), or of its own seed, so that the first 8 of a batch of 64 are the
        batch of 8, bit for bit; a sample with seed k in a sequence is sample 0 of seed k.
    shape: of one increment, (B, *). dtype: drawn in float64 for float64, else in float32 and cast.
    device: where they are sent; they are drawn on the host, so that a seed gives the same
        samples on any device. No global generator is read or moved.
    first: the number of the first call; 0 draws what `start` does.

    To seed a generator and to fill a tensor costs more than a few normals do. So small samples (64
    numbers at most) that lie within the first 4096 numbers of a batch are drawn for 25 calls at
    once, in tiles of about 32 numbers. Which samples these are does not depend on the batch.
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
        self._wide = torch.float64 if dtype == torch.float64 else torch.float32
        self._as_drawn = dtype == self._wide and self.device.type == "cpu"
        self._size = math.prod(self.shape[1:])
        small = 0 < self._size <= _SMALL
        self._tile = max(1, _TILE // self._size) if small else 0
        # How many samples are drawn in blocks. With seeds of their own all are sample 0.
        early = min(_TILES * self._tile, shape[0]) if isinstance(self.seed, int) else shape[0]
        self._early = early if small else 0
        self._block, self._ahead = -1, _NOTHING  # what is drawn and not called for yet

    def __call__(self, t: Tensor, s: Tensor) -> Tensor:
        call = self.call
        self.call = call + 1
        if not self._early or not call:
            return self.draw(call)
        block, k = divmod(call - 1, _CALLS)
        if block != self._block or self._ahead[k] is None:
            self._block, self._ahead = block, list(self._draw_block(block).unbind(0))
        z, self._ahead[k] = self._ahead[k], None
        assert z is not None
        return z if self._early == self.shape[0] else self._joined(z, call)

    def draw(self, call: int) -> Tensor:
        """The unit normals of the given call, of `shape`."""
        if self._early and call:
            block, k = divmod(call - 1, _CALLS)
            z = self._draw_block(block)[k].clone()
            return z if self._early == self.shape[0] else self._joined(z, call)
        if isinstance(self.seed, int):
            return self._sent(self._fill(self.seed, call, self.shape))
        one = (1, *self.shape[1:])
        return self._sent(torch.cat([self._fill(seed, call, one) for seed in self.seed]))

    def borrow(self) -> Iterator[Tensor]:
        """The calls from now on, for those who keep none: the tensors are filled again later."""
        if not self._in_blocks(_CALLS):
            yield from self._borrow_joined()
        calls: tuple[Tensor, ...] | None = None
        for z in self.chunks(_CALLS):
            calls = calls or z.unbind(0)
            yield from calls

    def _borrow_joined(self) -> Iterator[Tensor]:
        """`borrow` where some samples, or all, are drawn call by call."""
        n, now = self._early, torch.zeros(())
        here = self._as_drawn and self.call and n < self.shape[0]
        while not here or not isinstance(self.seed, int):
            yield self(now, now)
        first = SeededNoise(self.seed, (n, *self.shape[1:]), self.dtype, first=self.call)
        early = first.borrow() if n else None
        z, whole = self._room(self.shape, skip=n * self._size)
        while True:
            stream = _stream(self.seed, self.call)
            whole.normal_(generator=self._generator.manual_seed(stream))
            if early is not None:
                z.narrow(0, 0, n).copy_(next(early))
            self.call += 1
            yield z

    def chunks(self, calls: int) -> Iterator[Tensor]:
        """So many calls at a time, (calls, B, *), in one tensor that is filled again each time."""
        if not self._in_blocks(calls):
            now, z = torch.zeros(()), torch.empty(calls, *self.shape, dtype=self.dtype)
            z = z.to(self.device)
            while True:
                for each in z.unbind(0):
                    each.copy_(self(now, now))
                yield z
        assert isinstance(self.seed, int)
        n, numbers = self._early, self._tile * self._size
        tiles = -(-n // self._tile)
        drawn, whole = self._room((tiles, _CALLS, numbers))
        z = torch.empty(calls, tiles * numbers, dtype=self.dtype)
        blocks = z.view(calls // _CALLS, _CALLS, -1, numbers).unbind(0)
        source, z = drawn.transpose(0, 1), z.view(calls, -1, *self.shape[1:])[:, :n]
        while True:
            for block in blocks:
                stream = _stream(self.seed, _BLOCKS + self.call // _CALLS)
                whole.normal_(generator=self._generator.manual_seed(stream))
                block.copy_(source)
                self.call += _CALLS
            yield z

    def _in_blocks(self, calls: int) -> bool:
        """Whether the next calls are whole blocks, made here."""
        return (
            0 < self._early == self.shape[0]
            and isinstance(self.seed, int)
            and self.device.type == "cpu"
            and self.call % _CALLS == 1
            and calls % _CALLS == 0
        )

    def _draw_block(self, block: int) -> Tensor:
        """25 calls of the early samples, (25, early, *): drawn tile by tile, then call by call."""
        n, numbers = self._early, self._tile * self._size
        if isinstance(self.seed, int):
            tiles = -(-n // self._tile)
            z = self._fill(self.seed, _BLOCKS + block, (tiles, _CALLS, numbers))
        else:
            one = (1, _CALLS, numbers)
            z = torch.cat(
                [self._fill(seed, _BLOCKS + block, one)[..., : self._size] for seed in self.seed]
            )
        z = z.transpose(0, 1).reshape(_CALLS, -1, *self.shape[1:])[:, :n]
        return self._sent(z) if n == self.shape[0] else z

    def _joined(self, early: Tensor, call: int) -> Tensor:
        """The early samples of a call and the others, which are drawn call by call."""
        assert isinstance(self.seed, int)
        z = self._fill(self.seed, call, self.shape, skip=early.numel())
        z.narrow(0, 0, self._early).copy_(early)
        return self._sent(z)

    def _fill(self, seed: int, call: int, shape: tuple[int, ...], skip: int = 0) -> Tensor:
        """A tensor filled with the normals of one stream; its first `skip` numbers are left out."""
        z, whole = self._room(shape, skip)
        whole.normal_(generator=self._generator.manual_seed(_stream(seed, call)))
        return z

    def _room(self, shape: tuple[int, ...], skip: int = 0) -> tuple[Tensor, Tensor]:
        """An empty tensor of that shape, and what to fill for it, the first `skip` numbers aside.

        torch fills in blocks of 16 and redraws an incomplete last one: whole blocks make a short
        batch the beginning of a long one.
        """
        size = math.prod(shape)
        whole = skip - (skip - size) // 16 * 16
        if whole == size and not skip:
            z = torch.empty(shape, dtype=self._wide)
            return z, z
        flat = torch.empty(whole, dtype=self._wide)
        return flat[:size].view(shape), flat[skip:]

    def _sent(self, z: Tensor) -> Tensor:
        if self._as_drawn:
            return z
        return z.to(device=self.device, dtype=self.dtype, non_blocking=True)


def area(noise: Noise, t: Tensor, s: Tensor) -> Tensor:
    """Unit normals zeta, independent of z = noise(t, s), of the space-time Levy area over [t, s]:

        INT_t^s (W_u - W_t) du = h sqrt|h| (z/2 + zeta/sqrt(12)),   h = s - t

    The source's own `area(t, s)` if it has one. Otherwise a second call, which is right for those
    whose every call is fresh, such as SeededNoise. Source: Foster, Lyons & Oberhauser (2020).
    """
    own = getattr(noise, "area", None)
    return own(t, s) if own is not None else noise(t, s)


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
