"""A UNet for audio and time series.

diffusers' `UNet1DModel` is not used: it knows no classes, sees the time only as further channels of
its input, and its blocks are of the one shape that Dance Diffusion had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from sdeflow.errors import ArgumentError, ShapeError, positive_int
from sdeflow.plugins import Factory, hookimpl

from .conditioning import Condition, Modulation, class_count, modulate, told
from .dit import SelfAttention
from .unet import check_levels


class UNet1D(nn.Module):
    """A UNet for audio and time series: residual blocks at falling rates, modulated by t and class.

    A network F(x, t, label) -> tensor of the shape of x; x (B, C, L), t (B,), label (B,). The last
    convolution of each block, and of the network, begins as zero.

    Args:
        shape: of one sample, (C, L); L divisible by stride^(levels - 1). Called, the network takes
            any such length.
        channels: the width of each level, from the finest down; each divisible by `groups`.
        layers: residual blocks per level, on the way down and on the way up.
        stride: a level is this many times shorter than the one above it.
        kernel: the width of the convolutions, odd.
        attention: the levels with self-attention, counted from 0, the finest; its cost grows with
            the square of the level's length.
        head: the channels of an attention head.
        groups: of the group normalisations.
        dropout: probability, in the residual blocks.
        time_scale: t is multiplied by this before its sinusoidal embedding, made for 0..1000;
            beyond 1 its logarithm counts (`unfold_time`).
        classes: K of a conditional network, 0 for none; label K is "no class".

    Source: the UNet of Ho et al. (2020, DDPM), appendix B, in one dimension; scale and shift by
    the condition, Nichol & Dhariwal (2021), appendix A.
    """

    def __init__(
        self,
        shape: Sequence[int],
        channels: Sequence[int] = (32, 64, 128),
        layers: int = 1,
        stride: int = 2,
        kernel: int = 3,
        attention: Sequence[int] = (),
        head: int = 32,
        groups: int = 8,
        dropout: float = 0.0,
        time_scale: float = 1000.0,
        classes: int = 0,
    ) -> None:
        super().__init__()
        channels, layers = tuple(channels), positive_int("layers", layers)
        check_levels(channels, attention, head, groups, dropout)
        if positive_int("stride", stride) < 2 or positive_int("kernel", kernel) % 2 == 0:
            raise ArgumentError(f"stride={stride} must be >= 2 and kernel={kernel} odd, such as 3")
        self.channels, self.factor = (tuple(shape) or (0,))[0], stride ** (len(channels) - 1)
        self._check_shape(tuple(shape))
        self.classes, width = class_count(classes), 4 * channels[0]
        self.condition = Condition(width, self.classes, channels[0], time_scale)

        def block(inner: int, outer: int, level: int) -> _Block:
            heads = outer // min(head, *channels) if level in attention else 0
            return _Block(inner, outer, width, kernel, groups, dropout, heads)

        self.first = nn.Conv1d(shape[0], channels[0], kernel, padding=kernel // 2)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.shrink, self.grow = nn.ModuleList(), nn.ModuleList()
        h, kept = channels[0], []
        for level, c in enumerate(channels):
            for _ in range(layers):
                self.down.append(block(h, c, level))
                kept.append(c)
                h = c
            if level < len(channels) - 1:
                self.shrink.append(nn.Conv1d(c, c, 2 * stride - 1, stride, padding=stride - 1))
        self.middle = block(h, h, len(channels) - 1)
        for level, c in reversed(list(enumerate(channels))):
            for _ in range(layers):
                self.up.append(block(h + kept.pop(), c, level))
                h = c
            if level:  # each output sees two inputs; the length grows by exactly the stride
                h, odd = channels[level - 1], stride % 2
                cut = (stride + odd) // 2
                self.grow.append(nn.ConvTranspose1d(c, h, 2 * stride, stride, cut, odd))
        self.norm = nn.GroupNorm(groups, h)
        self.last = nn.Conv1d(h, shape[0], kernel, padding=kernel // 2)
        self.layers = layers
        nn.init.zeros_(self.last.weight)
        if self.last.bias is not None:
            nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """F(x, t, label): x (B, C, L), t (B,), label (B,); returns the shape of x."""
        self._check_shape(tuple(x.shape[1:]))
        vector = self.condition(*told(x, t, label, self.classes))
        h, kept = self.first(x), []
        for i, block in enumerate(self.down):
            if i and i % self.layers == 0:
                h = self.shrink[i // self.layers - 1](h)
            h = block(h, vector)
            kept.append(h)
        h = self.middle(h, vector)
        for i, block in enumerate(self.up):
            if i and i % self.layers == 0:
                h = self.grow[i // self.layers - 1](h)
            h = block(torch.cat((h, kept.pop()), 1), vector)
        return self.last(silu(self.norm(h)))

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        """Refuse the shape of a sample that does not fit."""
        if len(shape) != 2 or shape[0] != self.channels or not all(shape):
            raise ShapeError(
                f"shape={shape} of one sample must be (channels, length) for network 'unet_1d', "
                "with the channels that it was built for; for images use network 'unet' or 'dit', "
                "for vectors 'mlp'"
            )
        if shape[1] % self.factor:
            raise ShapeError(
                f"shape={shape}: the length must be divisible by {self.factor}, stride^(levels - "
                "1); give fewer channels or a smaller stride, or pad"
            )


class _Block(nn.Module):
    """h + convolutions, the second one modulated by the condition; then attention, if any."""

    def __init__(
        self,
        inner: int,
        outer: int,
        condition: int,
        kernel: int,
        groups: int,
        dropout: float,
        heads: int,
    ) -> None:
        super().__init__()
        self.norm_1 = nn.GroupNorm(groups, inner)
        self.conv_1 = nn.Conv1d(inner, outer, kernel, padding=kernel // 2)
        self.modulation = Modulation(condition, 2, outer)
        self.norm_2 = nn.GroupNorm(groups, outer)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = nn.Conv1d(outer, outer, kernel, padding=kernel // 2)
        self.skip = nn.Conv1d(inner, outer, 1) if inner != outer else nn.Identity()
        self.norm_3 = nn.GroupNorm(groups, outer) if heads else None
        self.attention = SelfAttention(outer, heads) if heads else None
        for module in (self.conv_2, self.attention.out if self.attention else None):
            if module is not None and module.bias is not None:
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        shift, scale = self.modulation(vector)
        h = self.conv_1(silu(self.norm_1(x)))
        h = silu(modulate(self.norm_2(h), shift[..., None], scale[..., None]))
        h = self.skip(x) + self.conv_2(self.dropout(h))
        if self.attention is not None and self.norm_3 is not None:
            h = h + self.attention(self.norm_3(h).transpose(1, 2)).transpose(1, 2)
        return h


@hookimpl
def sdeflow_networks() -> Mapping[str, Factory]:
    return {"unet_1d": UNet1D}
