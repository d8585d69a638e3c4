"""Samples to judge: drawn from a trained network by seeds, in batches, the classes balanced."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdeflow.denoiser import Denoiser
from sdeflow.errors import ArgumentError

from ..generate.sampler import Sampler
from ..guidance import cfg
from .real import labels_of

BATCH = 250


class Samples(NamedTuple):
    """x: (n, *shape), on the host. evaluations: of the network, for each sample."""

    x: Tensor
    evaluations: int


def draw(
    denoiser: Denoiser,
    shape: Sequence[int],
    sampler: Sampler,
    steps: int,
    seeds: Sequence[int],
    labels: Tensor | None = None,
    guidance: float = 1.0,
    device: torch.device | str = "cpu",
    batch: int = BATCH,
    progress: str = "",
) -> Samples:
    """A sample for each seed, with the class labels[k] if there are labels.

    guidance: the weight w of D_null + w (D_class - D_null). progress: what a bar is called; no bar
    if empty.
    """
    from tqdm.auto import tqdm

    parts, most = [], 0
    with tqdm(total=len(seeds), desc=progress, unit="sample", disable=not progress) as bar:
        for start in range(0, len(seeds), batch):
            some = list(seeds[start : start + batch])
            here = denoiser
            if labels is not None:
                here = cfg(denoiser, labels[start : start + batch].to(device), guidance)
            solution = sampler.run(here, (len(some), *shape), steps, some, device)
            parts.append(solution.x.cpu())
            most = max(most, solution.nfe)
            bar.update(len(some))
    return Samples(torch.cat(parts), most)


def classes_of(denoiser: Denoiser) -> int:
    """The number of classes of the network; 0 for an unconditional one."""
    return int(getattr(denoiser.net, "classes", 0))


def balanced(n: int, data: Any) -> Tensor:
    """A label for each of n samples: the classes of a data set in turn, each as often, give one."""
    labels = labels_of(data)
    if labels is None:
        raise ArgumentError("the data set has no labels, and the network has classes; retrain it")
    classes = labels.unique()
    return classes[torch.arange(n) % len(classes)]


def read_samples(path: Path) -> tuple[Tensor, Tensor | None]:
    """(samples, labels) in a file of `sdeflow sample --save`; no pickle is loaded.

    A .npy file holds the samples alone; a .safetensors file "x", and "labels" where it has them.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix == ".npy":
        return _numpy("samples", path).float(), None
    if path.suffix != ".safetensors":
        raise ArgumentError(f"samples={str(path)!r} must be a .npy or a .safetensors file")
    try:
        found = load_file(path)
        return found["x"].float(), found.get("labels")
    except (OSError, KeyError, SafetensorError) as error:
        raise ArgumentError(f"samples={str(path)!r} cannot be read: {error}") from error


def read_labels(path: Path) -> Tensor:
    """The labels in a .npy file."""
    return _numpy("labels", path)


def _numpy(name: str, path: Path) -> Tensor:
    """The numbers in a .npy file."""
    import numpy as np

    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, TypeError) as error:
        raise ArgumentError(f"{name}={str(path)!r} cannot be read: {error}") from error
