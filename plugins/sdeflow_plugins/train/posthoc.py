"""Post-hoc EMA: a power average of the weights of any width, after the training.

The run tracks a few power averages and takes snapshots; a linear combination of the snapshots comes
close to the average of any other width.

Source: Karras et al. (2024, EDM2), section 3 and appendix C. The package ema-pytorch has it too,
but keeps its snapshots as pickles, which nothing here ever loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from sdeflow.errors import ArgumentError

from . import checkpoint
from .average import exponent

if TYPE_CHECKING:
    from .state import State

FAR = 0.3
"""A combination whose profile is farther off than this is refused; none at all has distance 1."""


class Posthoc(NamedTuple):
    """An average made after the training.

    tensors: a state_dict. step: the snapshot that it ends with. distance: of the profile from the
    one asked for, in the L2 norm relative to the latter.
    """

    tensors: dict[str, Tensor]
    step: int
    distance: float


# ---- during the training


def take_snapshot(folder: Path, state: State) -> Path:
    """Write the tracked averages of a state as they are now; returns the manifest."""
    tensors = {
        f"{width}.{name}": tensor
        for width, average in state.posthoc.items()
        for name, tensor in average.module.state_dict().items()
    }
    facts: dict[str, Any] = {"widths": list(state.posthoc), "classes": state.classes}
    return checkpoint.write(folder, state.step, tensors, {**facts, "shape": list(state.shape)})


# ---- after it


def combination(
    steps: Sequence[float], widths: Sequence[float], step: float, width: float
) -> tuple[np.ndarray, float]:
    """The shares of known averages in one at `step` of `width`, and the distance that remains.

    steps, widths: one of each for every average known. The shares minimise |p - sum_i x_i p_i| in
    L2 under sum_i x_i = 1, so that weights at rest stay as they are (the paper leaves that to the
    number of snapshots). Source: Karras et al. (2024), algorithm 3.
    """
    gammas = np.array([exponent(w) for w in widths])
    times = np.array(steps, dtype=float)
    gram = _inner(times[:, None], gammas[:, None], times, gammas)
    right = _inner(times, gammas, step, exponent(width))
    norm = _inner(step, exponent(width), step, exponent(width))
    scale = 1 / np.sqrt(np.diag(gram))  # so that early, tall profiles do not rule the cut
    border = np.block([[scale[:, None] * gram * scale, scale[:, None]], [scale, 0.0]])
    # Snapshots close together make it near singular: without a cut their rounding would grow.
    solved = np.linalg.lstsq(border, np.append(scale * right, 1.0), rcond=1e-12)[0]
    shares = scale * solved[:-1]
    rest = norm - 2 * shares @ right + shares @ gram @ shares
    return shares, float(np.sqrt(max(rest, 0.0) / norm))


def reconstruct(folder: str | Path, width: float, step: int | None = None) -> Posthoc:
    """The power average of any relative width from the snapshots in a folder.

    folder: RUN/posthoc. width: sigma_rel in (0, 0.28]. step: the snapshot that the average ends
    with; the last one unless given. A width that was tracked comes back as it was, bit for bit.
    """
    folder = Path(folder)
    exponent(width)
    found = {int(m.stem.removeprefix("step_")): m for m in checkpoint.manifests(folder)}
    if not found:
        raise ArgumentError(f"{folder} holds no snapshots; train with posthoc_every, such as 500")
    step = max(found) if step is None else step
    if step not in found:
        raise ArgumentError(f"step={step} has no snapshot in {folder}; there are: {sorted(found)}")
    _, last, facts = checkpoint.read(found[step])
    widths = facts["widths"]
    if width in widths:
        prefix = f"{width}."
        exact = {n.removeprefix(prefix): t for n, t in last.items() if n.startswith(prefix)}
        return Posthoc(exact, step, 0.0)
    known = [s for s in sorted(found) if s <= step]
    pairs = [(s, w) for s in known for w in widths]
    shares, distance = combination([s for s, _ in pairs], [w for _, w in pairs], step, width)
    if distance > FAR:
        raise ArgumentError(
            f"width={width}: the {len(known)} snapshots in {folder} up to step {step}, of widths "
            f"{widths}, come no closer than {distance:.2f} to it; take more of them "
            "(posthoc_every), or ask for a width nearer to those"
        )
    total: dict[str, Tensor] = {}
    for (s, w), share in zip(pairs, shares, strict=True):
        if w == widths[0]:
            tensors = last if s == step else checkpoint.read(found[s])[1]
        for name in (n for n in tensors if n.startswith(f"{w}.")):
            plain, value = name.removeprefix(f"{w}."), tensors[name]
            if value.is_floating_point():
                value = share * value.double() + total.get(plain, 0.0)
            total[plain] = value  # a whole number, such as a counter: the last one
    like = f"{widths[0]}."
    return Posthoc({n: t.to(last[like + n].dtype) for n, t in total.items()}, step, distance)


def _inner(ta: Any, ga: Any, tb: Any, gb: Any) -> Any:
    """int p_a p_b ds, for p(s) = (gamma + 1) s^gamma / t^(gamma + 1) on [0, t]."""
    least = np.minimum(ta, tb)
    powers = (least / ta) ** (ga + 1) * (least / tb) ** (gb + 1) / least
    return (ga + 1) * (gb + 1) / (ga + gb + 1) * powers
