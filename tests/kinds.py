"""Random smooth SDEs with every kind of noise, for hypothesis, and planted faults of reversal."""

import math

import torch
from hypothesis import strategies as st

from sdeflow import SDE, ReverseSDE
from sdeflow.calculus import correction

TIME = torch.tensor(0.3, dtype=torch.float64)
KINDS = ("elementwise", "own", "scalar", "scalar own", "matrix", "constant")
shapes = st.lists(st.integers(1, 3), min_size=0, max_size=3)
seeds = st.integers(0, 2**20)


class Smooth(SDE):
    """A random smooth diffusion: sines of random mixtures of the state, for states of `shape`."""

    def __init__(self, kind, shape, seed):
        random = torch.Generator().manual_seed(seed)
        self.kind, self.shape, self.d = kind, tuple(shape), math.prod(shape)
        self.m = {"matrix": 3}.get(kind, 1)
        draw = {"generator": random, "dtype": torch.float64}
        self.mix = torch.randn(self.d, self.m, self.d, **draw)
        self.phase = torch.randn(self.d, self.m, **draw)

    noise = property(
        lambda self: {"own": "elementwise", "constant": "elementwise"}.get(
            self.kind, self.kind.split()[0]
        )
    )

    def drift(self, x, t):
        return torch.cos(x) - t

    def diffusion(self, x, t):
        flat = x.reshape(x.shape[0], self.d)
        if self.kind == "constant":
            return torch.tensor(0.7, dtype=torch.float64)
        if "own" in self.kind:
            g = torch.sin(flat * self.mix[:, 0, 0] + self.phase[:, 0]) + 2 + t
        else:
            g = torch.sin(torch.einsum("imj,bj->bim", self.mix, flat) + self.phase) + t
        return g.reshape(*x.shape, self.m) if self.noise == "matrix" else g.reshape(x.shape)


def full(sde, x):
    """G at the state x of one sample (d,) as a matrix (d, m)."""
    g = sde.diffusion(x.reshape(1, *sde.shape), TIME)
    if sde.noise == "matrix":
        return g.reshape(sde.d, sde.m)
    g = (g * torch.ones(1, *sde.shape, dtype=x.dtype)).reshape(sde.d)
    return torch.diag(g) if sde.noise == "elementwise" else g[:, None]


def start(sde, batch=3):
    return torch.randn(batch, *sde.shape, dtype=torch.float64)


# ---- planted faults


class NoDivergence(ReverseSDE):
    """div(G G^T) forgotten."""

    def drift(self, x, t):
        weight = (1 + self.eta**2) / 2
        return super().drift(x, t) + weight * self.forward.divergence(x, t)


class StratonovichAsIto(ReverseSDE):
    """The Stratonovich drift of the forward SDE taken for its Ito drift."""

    def drift(self, x, t):
        return super().drift(x, t) - correction(self.forward, x, t)


class TwiceTheSquare(ReverseSDE):
    """2 g^2 in place of g^2: a forgotten half."""

    def drift(self, x, t):
        return 2 * super().drift(x, t) - self.forward.drift(x, t)


FAULTS = (NoDivergence, StratonovichAsIto, TwiceTheSquare)
