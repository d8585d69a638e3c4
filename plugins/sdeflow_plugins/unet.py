"""The convolutional UNet of diffusers, `UNet2DModel`, as a network for images.

diffusers is imported when a network is built, not before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from sdeflow.errors import ArgumentError, PluginError, positive_int
from sdeflow.plugins import Factory, hookimpl

GROUPS = 8


class UNet(nn.Module):
    """A UNet for images: residual blocks at falling resolutions, skips across, t embedded.

    A network F(x, t) -> tensor of the shape of x, x (B, C, H, W), t (B,).

    Args:
        shape: of one image, (C, H, W); H and W divisible by 2^(levels - 1).
        channels: the width of each level, from the finest down; each divisible by 8.
        layers: residual blocks per level on the way down, and one more on the way up.
        attention: the levels with self-attention, counted from 0, the finest.
        dropout: probability, in the residual blocks.
        time_scale: t is multiplied by this before its sinusoidal embedding, made for 0..1000.

    Source: Ho et al. (2020, DDPM), appendix B; diffusers' `UNet2DModel`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        channels: Sequence[int] = (32, 64),
        layers: int = 1,
        attention: Sequence[int] = (),
        dropout: float = 0.0,
        time_scale: float = 1000.0,
    ) -> None:
        super().__init__()
        shape, channels = tuple(shape), tuple(channels)
        _check(shape, channels, attention, dropout)
        try:
            from diffusers.models.unets.unet_2d import UNet2DModel
        except ImportError as error:
            raise PluginError(
                f"network 'unet' needs diffusers ({error}); pip install 'sdeflow[images]'"
            ) from error
        levels = range(len(channels))
        attends = ["Attn" if level in attention else "" for level in levels]
        self.time_scale = time_scale
        self.unet = UNet2DModel(
            sample_size=shape[1:],
            in_channels=shape[0],
            out_channels=shape[0],
            block_out_channels=channels,
            layers_per_block=positive_int("layers", layers),
            down_block_types=tuple(f"{a}DownBlock2D" for a in attends),
            up_block_types=tuple(f"{a}UpBlock2D" for a in reversed(attends)),
            norm_num_groups=GROUPS,
            attention_head_dim=min(16, *channels),
            dropout=dropout,
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """F(x, t): x (B, C, H, W), t (B,); returns the shape of x."""
        return self.unet(x, t * self.time_scale, return_dict=False)[0]


def _check(
    shape: tuple[int, ...], channels: tuple[int, ...], attention: Sequence[int], dropout: float
) -> None:
    if len(shape) != 3:
        raise ArgumentError(
            f"shape={shape} of one sample must be (channels, height, width) for network 'unet'; "
            "for vectors use network 'mlp'"
        )
    if not channels or any(width < 1 or width % GROUPS for width in channels):
        raise ArgumentError(f"channels={channels} must be multiples of {GROUPS}, such as (32, 64)")
    factor = 2 ** (len(channels) - 1)
    if shape[1] % factor or shape[2] % factor:
        raise ArgumentError(
            f"shape={shape}: {len(channels)} levels halve an image {len(channels) - 1} times, so "
            f"height and width must be divisible by {factor}; give fewer channels, or resize"
        )
    if any(level not in range(len(channels)) for level in attention):
        raise ArgumentError(
            f"attention={tuple(attention)} must name levels 0 to {len(channels) - 1}"
        )
    if not 0 <= dropout < 1:
        raise ArgumentError(f"dropout={dropout!r} must be in [0, 1)")


@hookimpl
def sdeflow_networks() -> Mapping[str, Factory]:
    return {"unet": UNet}
