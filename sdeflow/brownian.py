"""`BrownianPath`: one Brownian path on the elementary intervals of a grid, seen at coarser steps.

A noise source (unit normals for [t, s], and `area`) that is a function of its seed and the times
alone: asking twice, out of order or backwards gives the same path. For times that are not known
beforehand there is `BrownianTree`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import ArgumentError
from .grid import check_grid
from .noise import Seed, SeededNoise


class BrownianPath:
    """One Brownian path on a fine grid, seen at any coarser steps whose ends are nodes of it.

    With elementary intervals of length h_k and midpoint m_k, unit normals z_k and zeta_k, a step
    from t to s > t, of length h and midpoint m, sees

        W_s - W_t = sum_k sqrt(h_k) z_k,
        H = sum_k sqrt(h_k) (m - m_k)/h z_k + h_k sqrt(h_k/12)/h zeta_k,

    H = 1/h INT_t^s (W_u - W_t) du - (W_s - W_t)/2 being the space-time Levy area, N(0, h/12) and
    independent of W_s - W_t. Called, it gives (W_s - W_t)/sqrt(h); `area` gives H/sqrt(h/12).
    Backwards, the first changes its sign and the second does not.

    seed, shape, dtype, device: as for SeededNoise; sample i of a batch has the path that it has in
        any other batch. ts: the nodes, strictly monotone, either way.
    Nothing is stored but ts and the current blocks of 128 numbers a sample (or one increment): z_k
    is a function of (seed, sample, k), so a run may begin anywhere and be replayed either way.
    A step over m elementary intervals costs m draws. Source: Foster, Lyons & Oberhauser (2020).
    """

    def __init__(
        self,
        seed: Seed,
        shape: Sequence[int],
        ts: Any,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shape, self.dtype, self.device = tuple(shape), dtype, torch.device(device)
        self.ts = check_grid(ts)
        nodes = self.ts if self.ts[-1] > self.ts[0] else self.ts.flip(0)
        self._nodes, self._steps = nodes, nodes.diff()
        self._table = nodes.numpy()
        # Sample by sample, so that a short batch is the beginning of a long one; how many intervals
        # make a block depends on the size of one sample alone.
        fit = max(128 // max(torch.Size(self.shape[1:]).numel(), 1), 1)
        self._length = 1 << (fit.bit_length() - 1)
        self._draws = SeededNoise(seed, (shape[0], self._length, *shape[1:]), dtype)
        self._held: dict[int, tuple[int, Tensor]] = {}
        self.seed = self._draws.seed

    def __call__(self, t: Tensor, s: Tensor) -> Tensor:
        """(W_s - W_t) / sqrt|s - t|, of `shape`."""
        i, j = self._ends(t, s)
        return self._out(self._w(i, j) if i < j else -self._w(j, i))

    def area(self, t: Tensor, s: Tensor) -> Tensor:
        """H / sqrt(|s - t|/12), of `shape`."""
        return self._out(self._h(*sorted(self._ends(t, s))))

    def increment(self, t: Tensor | float, s: Tensor | float) -> tuple[Tensor, Tensor]:
        """W_s - W_t and INT_t^s (W_u - W_t) du: what exact solutions are made of."""
        i, j = self._ends(t, s)
        h = self._nodes[j] - self._nodes[i]
        root = h.abs().sqrt()
        z = self._w(i, j) if i < j else -self._w(j, i)
        zeta = self._h(min(i, j), max(i, j))
        return self._out(root * z), self._out(h * root * (z / 2 + zeta / 12**0.5))

    def values(self, ts: Any = None) -> Tensor:
        """W at the given nodes (all of them by default), (N+1, B, *); zero at ts[0] of the path."""
        times = self.ts if ts is None else torch.as_tensor(ts, dtype=torch.float64).reshape(-1)
        at, w, path = self.ts[0], torch.zeros(self.shape, dtype=torch.float64), []
        for t in times:
            if self._index(t) != self._index(at):
                w = w + (t - at).abs().sqrt() * self(at, t).to(w)
            at = t
            path.append(self._out(w))
        return torch.stack(path)

    def _ends(self, t: Tensor | float, s: Tensor | float) -> tuple[int, int]:
        i, j = self._index(t), self._index(s)
        if i == j:
            raise ArgumentError(
                f"t={float(t)!r} and s={float(s)!r} are one node: a step has a length"
            )
        return i, j

    def _index(self, t: Tensor | float) -> int:
        """The number of the node at time t, counted from the lowest."""
        if isinstance(t, Tensor) and t.ndim:
            raise ArgumentError(
                f"t has shape {tuple(t.shape)}: a BrownianPath knows one time for the whole batch; "
                "for times of each sample's own use BrownianTree"
            )
        time = float(t)
        k = int(self._table.searchsorted(time))
        if k < len(self._table) and self._table[k] == time:
            return k
        near = [n for n in (k - 1, k) if 0 <= n < len(self._table)]
        best = min(near, key=lambda n: abs(float(self._table[n]) - time))
        # Coarser grids are often computed anew: their times may be a few roundings away.
        slack = 1e-5 * float(self._steps[max(best - 1, 0) : best + 1].min())
        if not abs(float(self._table[best]) - time) <= slack:
            nodes = " and ".join(f"{float(self._table[n])!r}" for n in near)
            raise ArgumentError(
                f"t={time!r} is no node of this BrownianPath (nearest: {nodes}); ask at nodes of "
                "its grid ts, or use BrownianTree, which knows the path at every time"
            )
        return best

    def _w(self, low: int, high: int) -> Tensor:
        """The unit normals of W over the nodes low < high."""
        if high == low + 1:
            return self._interval(low, 0)
        h = self._nodes[high] - self._nodes[low]
        total = torch.zeros(self.shape, dtype=torch.float64)
        for a, b, z in self._pieces(low, high, 0):
            total = total + total_of(z * _beside(z, (self._steps[a:b] / h).sqrt()))
        return total

    def _h(self, low: int, high: int) -> Tensor:
        """The unit normals of the area over the nodes low < high."""
        if high == low + 1:
            return self._interval(low, 1)
        start, end = self._nodes[low], self._nodes[high]
        h, middle = end - start, (start + end) / 2
        total = torch.zeros(self.shape, dtype=torch.float64)
        for a, b, z in self._pieces(low, high, 0):
            away = middle - (self._nodes[a:b] + self._nodes[a + 1 : b + 1]) / 2
            weights = (12 * self._steps[a:b] / h).sqrt() * (away / h)
            total = total + total_of(z * _beside(z, weights))
        for a, b, zeta in self._pieces(low, high, 1):
            total = total + total_of(zeta * _beside(zeta, (self._steps[a:b] / h) ** 1.5))
        return total

    def _interval(self, k: int, kind: int) -> Tensor:
        block, place = divmod(k, self._length)
        return self._block(block, kind)[place]

    def _pieces(self, low: int, high: int, kind: int) -> Iterator[tuple[int, int, Tensor]]:
        """(a, b, the unit normals of the intervals a to b - 1), block by block."""
        for block in range(low // self._length, (high - 1) // self._length + 1):
            first = block * self._length
            a, b = max(low, first), min(high, first + self._length)
            yield a, b, self._block(block, kind)[a - first : b - first].double()

    def _block(self, block: int, kind: int) -> Tensor:
        """The unit normals z (kind 0) or zeta (kind 1) of one block, (length, B, *)."""
        held = self._held.get(kind)
        if held is None or held[0] != block:
            # Calls count from 1: call 0 of a seed is what the start of a run is made of.
            drawn = self._draws.draw((kind << 32) + block + 1).transpose(0, 1).contiguous()
            self._held[kind] = held = (block, drawn)
        return held[1]

    def _out(self, z: Tensor) -> Tensor:
        return z.to(dtype=self.dtype, device=self.device)


def _beside(z: Tensor, weights: Tensor) -> Tensor:
    return weights.reshape(-1, *[1] * (z.ndim - 1))


def total_of(z: Tensor) -> Tensor:
    """The sum over the first axis, the same to the last bit in a batch of any size; z is used up.

    torch's own order of adding depends on where in memory a column lies.
    """
    left = z.shape[0]
    while left > 1:
        half = left // 2
        z[:half] += z[left - half : left]
        left -= half
    return z[0]
