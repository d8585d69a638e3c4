"""Networks at chosen sizes, by name; any option still overrides a preset's.

`sdeflow train runs/x --network unet_32 --network_options.dropout 0`, or
`get("network", "unet_32", shape=(3, 32, 32), classes=10)`. The table is also docs/networks.md.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from sdeflow.plugins import Factory, hookimpl

from .dit import DiT
from .mlp import MLP
from .unet import UNet
from .unet_1d import UNet1D


class NetworkPreset(NamedTuple):
    """A network and its options, and what was measured of it, unconditional, at one shape."""

    network: type[nn.Module]
    shape: tuple[int, ...]
    parameters: int
    batch: int
    cpu: float | None
    """Samples/s, forward and backward in float32 on one CPU core; None where not measured."""
    gpu: float | None
    """The same in bf16 on one GPU, compiled; None where it was not measured."""
    options: dict[str, Any]
    source: str


S, B, L, XL = (
    {"width": 384, "depth": 12, "heads": 6},
    {"width": 768, "depth": 12, "heads": 12},
    {"width": 1024, "depth": 24, "heads": 16},
    {"width": 1152, "depth": 28, "heads": 16},
)
DDPM = {"channels": (128, 256, 256, 256), "layers": 2, "attention": (1,), "head": 256, "groups": 32}
IDDPM = {
    "channels": (128, 256, 384, 512),
    "layers": 3,
    "attention": (2, 3),
    "head": 64,
    "groups": 32,
    "scale_shift": True,
}

# fmt: off
NETWORK_PRESETS: dict[str, NetworkPreset] = {
    # name                          network  shape          parameters  batch  cpu   gpu
    #    options and source
    "unet_8":         NetworkPreset(UNet,   (1, 8, 8),            651_041, 64,   1120,  None,
     {"channels": (32, 64)},
     "digits; the demo's"),
    "unet_16":        NetworkPreset(UNet,   (3, 16, 16),        2_736_099, 64,   216,   None,
     {"channels": (32, 64, 128), "attention": (2,)},
     "small pictures"),
    "unet_28":        NetworkPreset(UNet,   (1, 28, 28),        3_939_393, 32,   54,    None,
     {"channels": (32, 64, 128), "layers": 2, "attention": (2,)},
     "MNIST and its like"),
    "unet_32_small":  NetworkPreset(UNet,   (3, 32, 32),        4_527_971, 32,   57,    None,
     {"channels": (32, 64, 128, 128), "attention": (2, 3)},
     "colour pictures on a CPU"),
    "unet_32":        NetworkPreset(UNet,   (3, 32, 32),       35_746_307, 128,  None,  None,
     DDPM | {"dropout": 0.1},
     "CIFAR-10 of Ho et al. (2020, DDPM): 35.7 M"),
    "unet_64":        NetworkPreset(UNet,   (3, 64, 64),      121_060_483, 64,   None,  None,
     IDDPM,
     "ImageNet-64 of Nichol & Dhariwal (2021): 120 M"),
    "dit_digits":     NetworkPreset(DiT,    (1, 8, 8),            722_209, 64,   311,   None,
     {"patch": 1, "width": 96, "depth": 4, "heads": 4},
     "a transformer to try on digits"),
    "dit_s":          NetworkPreset(DiT,    (4, 32, 32),       32_474_512, 256,  None,  None,
     {"patch": 2} | S,
     "DiT-S/2 of Peebles & Xie (2023): 33 M; patch=4 for 64x64"),
    "dit_b":          NetworkPreset(DiT,    (4, 32, 32),      129_534_736, 256,  None,  None,
     {"patch": 2} | B,
     "DiT-B/2: 130 M"),
    "dit_l":          NetworkPreset(DiT,    (4, 32, 32),      456_799_248, 128,  None,  None,
     {"patch": 2} | L,
     "DiT-L/2: 458 M"),
    "dit_xl":         NetworkPreset(DiT,    (4, 32, 32),      673_663_120, 128,  None,  None,
     {"patch": 2} | XL,
     "DiT-XL/2: 675 M"),
    "unet_1d_1k":     NetworkPreset(UNet1D, (1, 1024),            938_113, 64,   141,   None,
     {"channels": (32, 64, 128), "stride": 4, "attention": (2,)},
     "time series; waveforms of 1,024 samples"),
    "unet_1d_16k":    NetworkPreset(UNet1D, (1, 16384),        22_671_937, 32,   None,  None,
     {"channels": (64, 128, 256, 512), "layers": 2, "stride": 4, "attention": (3,), "head": 64},
     "audio: a second at 16 kHz"),
    "mlp_2d":         NetworkPreset(MLP,    (2,),                 121_474, 256,  63900, None,
     {"width": 128, "depth": 3},
     "points in the plane"),
    "mlp_embedding":  NetworkPreset(MLP,    (1024,),           15_890_432, 256,  956,   None,
     {"width": 1024, "depth": 6, "frequencies": 64},
     "embeddings of up to 1,024 dimensions"),
}
# fmt: on


def _named(preset: NetworkPreset) -> Factory:
    build = functools.partial(preset.network, **preset.options)
    kind, shape = preset.network.__name__, "x".join(map(str, preset.shape))
    millions = f"{preset.parameters / 1e6:.3g} M parameters at {shape}"
    build.__doc__ = f"{kind}, {millions}: {preset.source}."
    return build


@hookimpl
def sdeflow_networks() -> Mapping[str, Factory]:
    return {name: _named(preset) for name, preset in NETWORK_PRESETS.items()}
