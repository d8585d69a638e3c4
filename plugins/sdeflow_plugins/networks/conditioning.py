"""What a network is told beside x: the time and the class, checked, and as one vector."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sdeflow.errors import ArgumentError, ShapeError, positive_int, whole


def class_count(classes: int) -> int:
    """The number of classes as an int >= 0; 0 is an unconditional network."""
    count = whole(classes)
    if count is None or count < 0:
        raise ArgumentError(
            f"classes={classes!r} must be a whole number >= 0; 0 for an unconditional network"
        )
    return count


def told(x: Tensor, t: Tensor, label: Tensor | None, classes: int) -> tuple[Tensor, Tensor | None]:
    """(t, label) as a network uses them, both (B,); of an unconditional one the label is None.

    x: (B, *). t: (B,) or (). label: LongTensor (B,) of classes 0..K-1, or K, the null label "no
    class"; None is K for all. The range is checked on the CPU alone: on a GPU that would wait for
    the device at each call (there CUDA's own assertion stops a label out of range).
    """
    if t.ndim > 1 or t.ndim == 1 and len(t) != len(x):
        raise ShapeError(
            f"t has shape {tuple(t.shape)}; it must be () or, one time a sample, ({len(x)},)"
        )
    t = t.expand(len(x))
    if not classes:
        if label is not None:
            raise ArgumentError(
                "label was given to an unconditional network; call it as net(x, t), or build it "
                "with classes=K"
            )
        return t, None
    if label is None:
        return t, torch.full((len(x),), classes, device=x.device)
    if not isinstance(label, Tensor) or label.dtype != torch.long or label.shape != (len(x),):
        kind = f"{tuple(label.shape)}, {label.dtype}" if isinstance(label, Tensor) else repr(label)
        raise ShapeError(
            f"label is {kind}; it must be a torch.long tensor of shape ({len(x)},), such as "
            f"torch.full(({len(x)},), 3)"
        )
    if label.device.type == "cpu" and not torch.compiler.is_compiling() and len(label):
        low, high = label.aminmax()
        if low < 0 or high > classes:
            raise ArgumentError(
                f"label holds {int(low)} to {int(high)}; of {classes} classes it must hold 0 to "
                f"{classes - 1}, or {classes} for no class"
            )
    return t, label


def unfold_time(t: Tensor, scale: float) -> Tensor:
    """The time that is embedded: scale * u(t), u(t) = t in [-1, 1], sign(t)(1 + log|t|) beyond.

    Times of most SDEs run over [0, 1], and c_noise of prediction="edm" over [-2, 1.1]; there u is
    t itself. The noise levels of EDM run up to 80, and level 40 differs from 41 as little as 1
    from 1.025 does: beyond 1 it is the logarithm that counts. u is smooth to first order at 1.
    """
    size = t.abs()
    return scale * torch.where(size <= 1, t, t.sign() * (1 + size.clamp_min(1).log()))


class Sinusoids(nn.Module):
    """cos(w_k t), sin(w_k t) of t (B,), w_k = period^(-k/n), k < n: features (B, 2n).

    In t's precision, float32 at the least. Vaswani et al. (2017), section 3.5; period 10,000.
    """

    def __init__(self, n: int, period: float = 1e4) -> None:
        super().__init__()
        self.n, self.period = positive_int("frequencies", n), period

    def forward(self, t: Tensor) -> Tensor:
        """The features of t."""
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        k = torch.arange(self.n, device=t.device, dtype=t.dtype)
        angle = t[:, None] * torch.exp(k * (-math.log(self.period) / self.n))
        return torch.cat((angle.cos(), angle.sin()), 1)


class Condition(nn.Module):
    """Time and class as one vector (B, width): a small MLP of sinusoids of t, plus E[label].

    classes: K; the table E has K + 1 rows, the last for "no class". frequencies, time_scale,
    period: of the sinusoids of `unfold_time(t, time_scale)`.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        frequencies: int = 128,
        time_scale: float = 1000.0,
        period: float = 1e4,
    ) -> None:
        super().__init__()
        self.time_scale = time_scale
        self.sinusoids = Sinusoids(frequencies, period)
        self.time = nn.Sequential(
            nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.label = nn.Embedding(classes + 1, width) if classes else None
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)

    def forward(self, t: Tensor, label: Tensor | None) -> Tensor:
        """The vector of (t, label), both as `told` returns them."""
        features = self.sinusoids(unfold_time(t, self.time_scale))
        vector = self.time(features.to(self.time[0].weight.dtype))
        return vector if self.label is None else vector + self.label(label)


class Modulation(nn.Module):
    """n vectors made from the condition, shifts, scales and gates: (*, width) -> n times (*, out).

    Zero at first, so that a gated residual block begins as the identity: adaLN-Zero, Peebles & Xie
    (2023), section 3.2.
    """

    def __init__(self, width: int, n: int, out: int) -> None:
        super().__init__()
        self.n = n
        self.linear = nn.Linear(width, n * out)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        """The n vectors."""
        return self.linear(nn.functional.silu(vector)).chunk(self.n, -1)


def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """h (1 + scale) + shift."""
    return h * (1 + scale) + shift
