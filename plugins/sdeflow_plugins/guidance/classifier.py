"""Guidance by a classifier, the gradient of its log-probability by autograd.

Source: Dhariwal & Nichol (2021); Bansal et al. (2023).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdeflow.denoiser import batch_time
from sdeflow.errors import ArgumentError, GridError, one_of
from sdeflow.sde import GaussianSDE, as_time

from .arguments import Label, Weight, check_label, check_weight, labels_of, shaped
from .pair import Denoised


def classifier_guided(
    denoiser: Any,
    classifier: Callable[..., Tensor],
    label: Label,
    w: Weight = 1.0,
    *,
    of: str = "noisy",
) -> Denoised:
    """Guidance by a classifier, score + w grad_x log p(y | x, t), the gradient by autograd.

    denoiser: an unconditional one; anything with `sde` and denoise(x, t).
    classifier: of="noisy": (x, t) -> logits (B, K) of states x at times t (B,), trained on them.
        of="denoised": x0 -> logits (B, K) of clean data, asked at D(x, t), which lets any
        classifier guide, and takes the gradient through the network.
    label: one class, or one a sample. w: a finite number, or one a sample, (B,).

    In terms of D it is D + w (sigma^2/alpha) grad. Where gradients are wanted (integrate with
    grad=True) they flow through it. Source: Dhariwal & Nichol (2021), section 4; of="denoised":
    Bansal et al. (2023).
    """
    one_of("of", of, ("noisy", "denoised"))
    w = check_weight(w)
    check_label("label", label, None)
    if not callable(getattr(denoiser, "denoise", None)) or not callable(classifier):
        raise ArgumentError("classifier_guided needs a Denoiser and a classifier that is callable")
    sde: GaussianSDE = denoiser.sde

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        t = as_time(t)
        a, s = sde.kernel(x, t)
        if not a.ndim and not a:
            raise GridError(
                f"classifier guidance divides by alpha, which is 0 at t={float(t):.6g}; begin a "
                "little inside: t_max=0.999 T"
            )
        wanted = torch.is_grad_enabled()
        with torch.enable_grad():
            y = x if wanted and x.requires_grad else x.detach().requires_grad_()
            if of == "denoised":
                data = denoiser.denoise(y, t)
                logits = classifier(data)
            else:
                logits = classifier(y, batch_time(t, y))
            chosen = logits.log_softmax(1).gather(1, labels_of(label, x)[:, None])
            (slope,) = torch.autograd.grad(chosen.sum(), y, create_graph=wanted)
        if of == "noisy":
            data = denoiser.denoise(x, t)
        elif not wanted:
            data = data.detach()
        return data + (s * s / a) * (shaped(w, x) * slope)

    return Denoised(sde, denoise)
