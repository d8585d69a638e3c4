"""The diffusion transformer (DiT) for images.

diffusers' `DiTTransformer2DModel` is not used: it drops labels by itself while it trains, at times
of its own choosing, where here the loop draws them from (seed, step, place); it takes square images
only and always a label; and it keeps one table of times and labels in each of its blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from sdeflow.errors import ArgumentError, ShapeError, positive_int
from sdeflow.plugins import Factory, hookimpl

from .conditioning import Condition, Modulation, class_count, modulate, told


class DiT(nn.Module):
    """A diffusion transformer for images: patches as tokens, modulated by time and class.

    A network F(x, t, label) -> tensor of the shape of x; x (B, C, H, W), t (B,), label (B,). All
    gates and the last layer begin as zero (adaLN-Zero), so the untrained network is zero.

    Args:
        shape: of one image, (C, H, W); H and W divisible by `patch`.
        patch: the side of the square patches that become tokens.
        width: of a token; divisible by heads, and by 4.
        depth: transformer blocks.
        heads: of the attention.
        expansion: the hidden layer of a block's MLP is this many times as wide.
        time_scale: t is multiplied by this before its sinusoidal embedding, made for 0..1000;
            beyond 1 its logarithm counts (`unfold_time`).
        classes: K of a conditional network, 0 for none; label K is "no class".

    Source: Peebles & Xie (2023), section 3.2 and table 1; the sizes S, B, L and XL are presets.
    """

    def __init__(
        self,
        shape: Sequence[int],
        patch: int = 2,
        width: int = 96,
        depth: int = 4,
        heads: int = 4,
        expansion: int = 4,
        time_scale: float = 1000.0,
        classes: int = 0,
    ) -> None:
        super().__init__()
        self.shape, self.patch = tuple(shape), positive_int("patch", patch)
        width, heads = positive_int("width", width), positive_int("heads", heads)
        _check(self.shape, self.patch, width, heads)
        self.classes = class_count(classes)
        channels, self.rows, self.columns = shape[0], shape[1] // patch, shape[2] // patch
        positions = _positions(self.rows, self.columns, width)
        self.positions: Tensor
        self.register_buffer("positions", positions, persistent=False)
        self.condition = Condition(width, self.classes, time_scale=time_scale)
        self.embed = _xavier(channels * patch**2, width)
        self.blocks = nn.ModuleList(
            _Block(width, heads, positive_int("expansion", expansion))
            for _ in range(positive_int("depth", depth))
        )
        self.modulation = Modulation(width, 2, width)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.out = nn.Linear(width, channels * patch**2)
        for layer in self.condition.time.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """F(x, t, label): x (B, C, H, W), t (B,), label (B,); returns the shape of x."""
        if x.shape[1:] != self.shape:
            raise ShapeError(f"x has shape {tuple(x.shape)}; this network takes (B, *{self.shape})")
        vector = self.condition(*told(x, t, label, self.classes))[:, None]
        h = self.embed(self._to_tokens(x)) + self.positions
        for block in self.blocks:
            h = block(h, vector)
        return self._to_image(self.out(modulate(self.norm(h), *self.modulation(vector))))

    def _to_tokens(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, C p p): one row for each patch, from the top left."""
        p = self.patch
        parts = x.reshape(len(x), self.shape[0], self.rows, p, self.columns, p)
        return parts.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def _to_image(self, tokens: Tensor) -> Tensor:
        """The inverse of `_to_tokens`."""
        p = self.patch
        parts = tokens.reshape(len(tokens), self.rows, self.columns, self.shape[0], p, p)
        return parts.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), *self.shape)


class SelfAttention(nn.Module):
    """Multi-head self-attention of tokens (B, N, width), by torch's fused kernels."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = _xavier(width, 3 * width), _xavier(width, width)

    def forward(self, h: Tensor) -> Tensor:
        """The tokens, each a mixture of all."""
        parts = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(*parts.unbind(0))
        return self.out(mixed.transpose(1, 2).flatten(2))


class _Block(nn.Module):
    """h + gate * attention(...), then h + gate * MLP(...), both of modulated layer norms."""

    def __init__(self, width: int, heads: int, expansion: int) -> None:
        super().__init__()
        self.modulation = Modulation(width, 6, width)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = SelfAttention(width, heads)
        self.mlp = nn.Sequential(
            _xavier(width, expansion * width),
            nn.GELU(approximate="tanh"),
            _xavier(expansion * width, width),
        )

    def forward(self, h: Tensor, vector: Tensor) -> Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(vector)
        h = h + gate * self.attention(modulate(self.norm(h), shift, scale))
        return h + gate_mlp * self.mlp(modulate(self.norm(h), shift_mlp, scale_mlp))


def _xavier(inner: int, outer: int) -> nn.Linear:
    """A linear layer with Xavier's weights and no bias at first."""
    layer = nn.Linear(inner, outer)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _positions(rows: int, columns: int, width: int) -> Tensor:
    """Sines and cosines of the row, then of the column, of each patch: (rows * columns, width)."""
    n = width // 4
    omega = torch.exp(torch.arange(n) * (-math.log(1e4) / n))
    row, column = (torch.arange(length)[:, None] * omega for length in (rows, columns))
    row, column = (torch.cat((angle.sin(), angle.cos()), 1) for angle in (row, column))
    return torch.cat((row.repeat_interleave(columns, 0), column.repeat(rows, 1)), 1)


def _check(shape: tuple[int, ...], patch: int, width: int, heads: int) -> None:
    if len(shape) != 3:
        raise ShapeError(
            f"shape={shape} of one sample must be (channels, height, width) for network 'dit'; "
            "for vectors use network 'mlp', for series and audio 'unet_1d'"
        )
    if any(length < 1 for length in shape) or shape[1] % patch or shape[2] % patch:
        raise ShapeError(
            f"shape={shape}: height and width must be divisible by patch={patch}; give another "
            "patch, or resize"
        )
    if width % heads or width % 4:
        raise ArgumentError(f"width={width} must be divisible by heads={heads}, and by 4")


@hookimpl
def sdeflow_networks() -> Mapping[str, Factory]:
    return {"dit": DiT}
