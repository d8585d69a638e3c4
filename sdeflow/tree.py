"""`BrownianTree`: one Brownian path known at every time, for each sample at times of its own.

A noise source (unit normals for [t, s], and `area`) that is a function of its seed and the times
alone: for solvers that choose their own steps, where a rejected step must not change the path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .brownian import total_of
from .errors import ArgumentError, ShapeError, positive_int
from .noise import Seed, check_seed

AT_ONCE = 2**21
"""How many pairs of normals are made in one piece."""


class BrownianTree:
    """One Brownian path known at every time, for each sample at times of its own.

    W and its integral J_t = INT_0^t W du are sums over the 2^l intervals of each level l < depth
    that [0, T] is halved into, of which only the one that holds t counts: with h its length and d
    the distance of t from its nearer end, over h/2,

        W_t += sqrt(h) [d (3 d - 2) z/4 + c 3 d (1 - d) n/sqrt(12)]
        J_t += h sqrt(h) [c d^2 (d - 1) z/8 + d^2 (3 - 2 d) n/(4 sqrt(12))]

    c = 1 in its left half and -1 in its right; z and n are its two unit normals, hashed from
    (seed, sample, component, interval). This is the law of W and its area on the halves of an
    interval given both on the whole, written out. Inside an interval of the last level the law
    given its ends is drawn once more. So the path is exact in law at any times of which no two lie
    in one interval of the last level, T 2^-depth; nothing is stored, and nothing recurs.

    seed, shape, dtype, device: as for SeededNoise; it is computed on the device, in float64.
    T: the last time. depth: in [1, 48].
    Called, it gives unit normals (W_s - W_t)/sqrt|s - t|, and `area` those of the space-time area,
    which lose to rounding about 1e-15 (T/|s - t|)^1.5.
    Source: Foster, Lyons & Oberhauser (2020), theorems on the midpoint; Jelincic, Foster & Kidger
    (2024), section 4, whose descent of the tree is summed here in closed form.
    """

    def __init__(
        self,
        seed: Seed,
        shape: Sequence[int],
        T: float = 1.0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        depth: int = 24,
    ) -> None:
        if isinstance(T, bool) or not 0 < T < float("inf"):
            raise ArgumentError(f"T={T!r} must be a positive time, the last one to be asked for")
        if positive_int("depth", depth) > 48:
            raise ArgumentError(f"depth={depth} must be in [1, 48], the bits of a float64 time")
        self.seed, self.shape = check_seed(seed, shape[0]), tuple(shape)
        self.T, self.depth = float(T), depth
        self.dtype, self.device = dtype, torch.device(device)
        # Float64 is not everywhere: there the path is computed on the host.
        self._home = torch.device("cpu") if self.device.type == "mps" else self.device
        self._keys = _keys(self.seed, self.shape).to(self._home)
        count = 2 ** torch.arange(self.depth + 1, device=self._home).reshape(-1, 1, 1)
        h = self.T / torch.cat((count[:1], count)).double()
        self._levels = count, torch.stack((h.sqrt(), h * h.sqrt()))

    @property
    def resolution(self) -> float:
        """The shortest step that may be asked for, T 2^-depth."""
        return self.T * 2.0**-self.depth

    def __call__(self, t: Tensor, s: Tensor) -> Tensor:
        """(W_s - W_t) / sqrt|s - t|, of `shape`; t and s are () or (B,)."""
        return self._normals(t, s)[0]

    def area(self, t: Tensor, s: Tensor) -> Tensor:
        """H / sqrt(|s - t|/12), of `shape`."""
        return self._normals(t, s)[1]

    def at(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """W_t and INT_0^t W du at t, () or (B,), in float64: (B, *) each; W_0 = 0.

        Many times at once, (K, B) or (K, 1), give (K, B, *).
        """
        times = self._times(t)
        flat = times.reshape(1, -1) if times.ndim < 2 else times
        size = self._keys.shape[1]
        rows = max(1, AT_ONCE // ((self.depth + 2) * max(size, 1) * len(flat)))
        parts = []
        for first in range(0, max(self.shape[0], 1), rows):
            keys = self._keys[first : first + rows]
            own = flat if flat.shape[1] == 1 else flat[:, first : first + rows]
            parts.append(self._sums(own, keys))
        w, j = torch.cat(parts, 2).reshape(2, len(flat), *self.shape)
        return (w, j) if times.ndim == 2 else (w[0], j[0])

    def _normals(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        t, s = torch.broadcast_tensors(self._times(t), self._times(s))
        h = s - t
        if not (h.abs() >= self.resolution * (1 - 1e-9)).all():
            raise ArgumentError(
                f"t and s are {float(h.abs().min()):.3g} apart; this BrownianTree resolves "
                f"T 2^-depth = {self.resolution:.3g}: give it a larger depth (now {self.depth})"
            )
        w, j = self.at(torch.stack((t, s)).reshape(2, -1))
        h = h.reshape(-1, *[1] * (len(self.shape) - 1))
        root = h.abs().sqrt()
        z = (w[1] - w[0]) / root
        zeta = 12**0.5 * ((j[1] - j[0] - h * w[0]) / (h * root) - z / 2)
        return z.to(self.device, self.dtype), zeta.to(self.device, self.dtype)

    def _times(self, t: Tensor | float) -> Tensor:
        times = torch.as_tensor(t, dtype=torch.float64).to(self._home)
        if times.ndim > 2 or times.ndim and times.shape[-1] not in (1, self.shape[0]):
            raise ShapeError(
                f"t has shape {tuple(times.shape)}; it must be () or ({self.shape[0]},), the batch"
            )
        if not ((times >= 0) & (times <= self.T * (1 + 1e-12))).all():
            low, high = float(times.min()), float(times.max())
            raise ArgumentError(
                f"t={high if low >= 0 else low} must be in [0, T = {self.T!r}]; make the "
                "BrownianTree with the last time of the grid as its T"
            )
        return times

    def _sums(self, t: Tensor, keys: Tensor) -> Tensor:
        """W and J at the times t, (K, B) or (K, 1), for the samples with these keys, (B, n)."""
        count, scale = self._levels
        scaled = (t / self.T).clamp(max=1.0) * count
        place = torch.minimum(scaled.long(), count - 1)
        # The number of an interval among all is 2^l + its place; 0 is that of the path's ends.
        z, n = _normal_pairs(keys, torch.cat((torch.zeros_like(place[:1]), count + place)))
        by_z, by_n = (scale * _weights(scaled - place)).unsqueeze(-1).transpose(1, 2).unbind(0)
        return total_of(by_z * z.unsqueeze(1) + by_n * n.unsqueeze(1))


def _weights(x: Tensor) -> Tensor:
    """What z and n weigh in W and J: (z or n, W or J, interval, *), the intervals being the whole,
    those of each level, and the inside of the last; x in [0, 1] is the place in each level's."""
    c = 1.0 - 2 * (x >= 0.5)
    d = 1 - (2 * x - 1).abs()
    square, rest = d * d, c * (1 - d)
    levels = (
        d * (0.75 * d - 0.5),
        square * rest * -0.125,
        d * rest * 0.75**0.5,
        square * (3 - 2 * d) * 192**-0.5,
    )
    y = x[:1]
    whole = y, y * y * 0.5, y * (1 - y) * 3**0.5, y * y * (3 - 2 * y) * 12**-0.5
    # Given both ends, W and J inside have the covariance [[p q, p^2 r], [., p^3/3]]: its root.
    y = x[-1:]
    p = y * (1 - y)
    q, r = 1 - 3 * p, 0.5 - y
    root = (p / q).sqrt()
    inside = q * root, p * root * r, 0 * p, p * root * 12**-0.5
    rows = torch.cat((torch.stack(whole), torch.stack(levels)[:, :-1], torch.stack(inside)), 1)
    return rows.unflatten(0, (2, 2))


def _keys(seed: int | tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """64 bits for each sample and component, (B, n)."""
    batch, size = shape[0], torch.Size(shape[1:]).numel()
    if isinstance(seed, int):
        samples = _mix(_mix(torch.full((batch,), seed)) + torch.arange(batch) * GOLDEN)
    else:
        samples = _mix(_mix(torch.tensor(seed, dtype=torch.int64)))
    return _mix(samples.unsqueeze(1) + torch.arange(1, size + 1) * GOLDEN)


def _normal_pairs(keys: Tensor, node: Tensor) -> tuple[Tensor, Tensor]:
    """Two unit normals (Box & Muller 1958) for each key (B, n) and node (R, K, B): (R, K, B, n)."""
    bits = _mix(_mix(node).unsqueeze(-1) ^ keys)
    radius = (_unit(bits).log_() * -2).sqrt_()
    angle = _unit(_mix(bits + GOLDEN)).mul_(2 * math.pi)
    return radius * angle.cos(), radius * angle.sin()


def _unit(bits: Tensor) -> Tensor:
    """The upper 53 bits as a float64 in (0, 1]."""
    return (((bits >> 11) & (2**53 - 1)) + 1).double().mul_(2.0**-53)


def _mix(z: Tensor) -> Tensor:
    """64 bits well mixed, one to one. Source: Steele, Lea & Flood (2014), splitmix64."""
    z = (z ^ ((z >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & (2**33 - 1))


GOLDEN = -0x61C8864680B583EB
"""2^64 over the golden ratio, as a signed number."""
