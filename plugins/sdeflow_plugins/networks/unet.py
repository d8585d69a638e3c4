"""The convolutional UNet of diffusers, `UNet2DModel`, as a network for images.

diffusers is imported when a network is built, not before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from sdeflow.errors import ArgumentError, PluginError, ShapeError, positive_int
from sdeflow.plugins import Factory, hookimpl

from .conditioning import Sinusoids, class_count, told, unfold_time


class UNet(nn.Module):
    """A UNet for images: residual blocks at falling resolutions, skips across, t embedded.

    A network F(x, t, label) -> tensor of the shape of x; x (B, C, H, W), t (B,), label (B,).

    Args:
        shape: of one image, (C, H, W); H and W divisible by 2^(levels - 1). Called, the network
            takes any such height and width.
        channels: the width of each level, from the finest down; each divisible by `groups`.
        layers: residual blocks per level on the way down, and one more on the way up.
        attention: the levels with self-attention, counted from 0, the finest. The middle has it
            always.
        head: the channels of an attention head.
        groups: of the group normalisations.
        scale_shift: t and the class scale the features as well as shift them.
        dropout: probability, in the residual blocks.
        time_scale: t is multiplied by this before its sinusoidal embedding, made for 0..1000;
            beyond 1 its logarithm counts (`unfold_time`).
        classes: K of a conditional network, 0 for none; label K is "no class".

    Source: Ho et al. (2020, DDPM), appendix B; scale_shift: Nichol & Dhariwal (2021, iDDPM),
    appendix A; diffusers' `UNet2DModel`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        channels: Sequence[int] = (32, 64),
        layers: int = 1,
        attention: Sequence[int] = (),
        head: int = 16,
        groups: int = 8,
        scale_shift: bool = False,
        dropout: float = 0.0,
        time_scale: float = 1000.0,
        classes: int = 0,
    ) -> None:
        super().__init__()
        shape, channels = tuple(shape), tuple(channels)
        check_levels(channels, (*attention, len(channels) - 1), head, groups, dropout)
        self.channels, self.factor = shape[0] if shape else 0, 2 ** (len(channels) - 1)
        self._check_shape(shape)
        self.classes, self.time_scale = class_count(classes), time_scale
        try:
            from diffusers.models.unets.unet_2d import UNet2DModel
        except ImportError as error:
            raise PluginError(
                f"network 'unet' needs diffusers ({error}); pip install 'sdeflow[images]'"
            ) from error
        attends = ["Attn" if level in attention else "" for level in range(len(channels))]
        self.unet = UNet2DModel(
            sample_size=shape[1:],
            in_channels=shape[0],
            out_channels=shape[0],
            block_out_channels=channels,
            layers_per_block=positive_int("layers", layers),
            down_block_types=tuple(f"{a}DownBlock2D" for a in attends),
            up_block_types=tuple(f"{a}UpBlock2D" for a in reversed(attends)),
            norm_num_groups=groups,
            attn_norm_num_groups=groups,
            attention_head_dim=min(head, *channels),
            resnet_time_scale_shift="scale_shift" if scale_shift else "default",
            dropout=dropout,
            num_class_embeds=self.classes + 1 if self.classes else None,
        )
        self.unet.time_proj = Sinusoids(channels[0] // 2)  # diffusers' own round float64 times

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """F(x, t, label): x (B, C, H, W), t (B,), label (B,); returns the shape of x."""
        self._check_shape(tuple(x.shape[1:]))
        t, label = told(x, t, label, self.classes)
        time = unfold_time(t, self.time_scale)
        return self.unet(x, time, class_labels=label, return_dict=False)[0]

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        """Refuse the shape of an image that does not fit."""
        if len(shape) != 3 or shape[0] != self.channels:
            raise ShapeError(
                f"shape={shape} of one sample must be (channels, height, width) for network "
                "'unet', with the channels that it was built for; for vectors use network 'mlp', "
                "for series and audio 'unet_1d'"
            )
        if shape[1] % self.factor or shape[2] % self.factor or not shape[1] * shape[2]:
            raise ShapeError(
                f"shape={shape}: this network halves an image {self.factor.bit_length() - 1} "
                f"times, so height and width must be divisible by {self.factor}; give fewer "
                "channels, or resize"
            )


def check_levels(
    channels: tuple[int, ...], attention: Sequence[int], head: int, groups: int, dropout: float
) -> None:
    """Refuse what no UNet can be built from; attention: all levels that have it."""
    groups = positive_int("groups", groups)
    if not channels or any(width < 1 or width % groups for width in channels):
        raise ArgumentError(
            f"channels={channels} must be multiples of {groups}, the groups; such as (32, 64)"
        )
    if channels[0] % 2:
        raise ArgumentError(f"channels={channels}: the first must be even, such as 32")
    if any(level not in range(len(channels)) for level in attention):
        raise ArgumentError(
            f"attention={tuple(attention)} must name levels 0 to {len(channels) - 1}"
        )
    head = min(positive_int("head", head), *channels)
    if any(channels[level] % head for level in attention):
        raise ArgumentError(
            f"channels={channels} of the levels with attention, and of the last, must be multiples "
            f"of head={head}"
        )
    if not 0 <= dropout < 1:
        raise ArgumentError(f"dropout={dropout!r} must be in [0, 1)")


@hookimpl
def sdeflow_networks() -> Mapping[str, Factory]:
    return {"unet": UNet}
