"""A small residual network for vectors: 2-D toys, embeddings, tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sdeflow.errors import positive_int
from sdeflow.plugins import Factory, hookimpl


class MLP(nn.Module):
    """A residual multi-layer perceptron with sinusoidal features of t, for states of any rank.

    A network F(x, t) -> tensor of the shape of x, x (B, *shape), t (B,).

    Args:
        shape: of one sample; it is flattened.
        width: of the hidden layers.
        depth: residual blocks.
        frequencies: sines and cosines of t, of periods from 2 pi down to 2 pi / time_scale.
        time_scale: the highest angular frequency in t.
    """

    omega: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 128,
        depth: int = 3,
        frequencies: int = 16,
        time_scale: float = 100.0,
    ) -> None:
        super().__init__()
        size = math.prod(positive_int("shape", length) for length in shape)
        width, n = positive_int("width", width), positive_int("frequencies", frequencies)
        self.register_buffer("omega", time_scale ** torch.linspace(0, 1, n), persistent=False)
        self.embed_t = nn.Sequential(nn.Linear(2 * n, width), nn.SiLU(), nn.Linear(width, width))
        self.embed_x = nn.Linear(size, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
            )
            for _ in range(positive_int("depth", depth))
        )
        self.out = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, size))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """F(x, t): x (B, *shape), t (B,); returns the shape of x."""
        angle = t[:, None] * self.omega.to(t.dtype)
        time = self.embed_t(torch.cat((angle.sin(), angle.cos()), 1))
        h = self.embed_x(x.flatten(1)) + time
        for block in self.blocks:
            h = h + block(h + time)
        return self.out(h).reshape(x.shape)


@hookimpl
def sdeflow_networks() -> Mapping[str, Factory]:
    return {"mlp": MLP}
