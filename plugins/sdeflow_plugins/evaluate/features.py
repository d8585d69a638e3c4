"""Feature networks by name: what a distance between images is measured in.

    judge            a small classifier trained on the run's own labelled images; 256 features
    state            the states themselves, flattened
    module:object    any network of the user's, such as Inception
    file.py:object   the same, in a file

`object` is an nn.Module, or a function that returns one, or any function of a batch (B, *shape) to
features (B, ...). The batch is as the data set gives it, images in [-1, 1]: whatever resizing a
network wants is a part of it. Weights are read from safetensors; no pickle is loaded.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdeflow.errors import ArgumentError, ShapeError

from .judge import Judge
from .real import BATCH


@dataclass(frozen=True)
class Features:
    """A map from states (B, *shape) to vectors (B, d), for distances.

    name: what the report calls it. network: the map. device: where it runs. version: a hash of its
    weights, so that a figure can say what it was measured with.
    """

    name: str
    network: Callable[[Tensor], Tensor]
    device: torch.device | str = "cpu"
    version: str = ""

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """The features of states, batch by batch, on the host."""
        return torch.cat([self._batch(part) for part in x.split(BATCH)])

    def _batch(self, x: Tensor) -> Tensor:
        out = self.network(x.to(self.device))
        if not isinstance(out, Tensor) or out.ndim < 2 or len(out) != len(x):
            got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise ShapeError(
                f"features={self.name!r} returned {got} for a batch of {len(x)}; it must return "
                "one row of features for each sample"
            )
        return out.flatten(1).float().cpu()


def state_features() -> Features:
    """The states themselves."""
    return Features("state", lambda x: x.flatten(1))


def judge_features(judge: Judge) -> Features:
    """Those of a judge."""
    return Features("judge", judge.features, version=fingerprint(judge))


def load_features(
    name: str,
    options: Mapping[str, Any] | None = None,
    weights: str = "",
    device: torch.device | str = "cpu",
) -> Features:
    """The network at `module:object` or `file.py:object`.

    options: keyword arguments of a function that makes the network. weights: a .safetensors file
    whose tensors are loaded into it, each by its name.
    """
    network = _find(name)
    if not isinstance(network, nn.Module) and not _takes_a_batch(network, options or {}):
        network = network(**(options or {}))
    elif options:
        raise ArgumentError(f"features={name!r} is a network already; it takes no options")
    if not callable(network):
        raise ArgumentError(
            f"features={name!r} gave {type(network).__name__}; it must be callable on a batch"
        )
    if weights:
        _load(network, name, Path(weights))
    if isinstance(network, nn.Module):
        network = network.eval().requires_grad_(False).to(device)
    version = fingerprint(network) if isinstance(network, nn.Module) else ""
    return Features(name, network, device, version)


def fingerprint(network: nn.Module) -> str:
    """A hash of a network's weights, of names, shapes and bytes: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        plain = tensor.detach().cpu().contiguous()
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def hash_of(*tensors: Tensor) -> str:
    """A hash of tensors, of shapes and bytes: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{tuple(plain.shape)} {plain.dtype}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _takes_a_batch(function: Any, options: Mapping[str, Any]) -> bool:
    """Whether a function must be given one thing more: a batch. Else it makes a network."""
    if not inspect.isfunction(function):
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind in kinds]
    return any(p.name not in options for p in needed)


def _find(name: str) -> Any:
    """The object at `module:object` or `file.py:object`; the working directory is searched too."""
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ArgumentError(
            f"features={name!r} is unknown; there are judge, state, and any module:object or "
            "file.py:object"
        )
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            if spec is None or spec.loader is None or not Path(place).is_file():
                raise ArgumentError(f"features={name!r}: there is no file {place}")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            here = str(Path.cwd())
            sys.path.insert(0, here)
            try:
                module = importlib.import_module(place)
            finally:
                sys.path.remove(here)
    except ImportError as error:
        raise ArgumentError(f"features={name!r} cannot be imported: {error}") from error
    if not hasattr(module, attribute):
        raise ArgumentError(f"features={name!r}: {place} has no {attribute!r}")
    return getattr(module, attribute)


def _load(network: Any, name: str, path: Path) -> None:
    """Load the tensors of a safetensors file into a module, each by its name, none left over."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not isinstance(network, nn.Module):
        raise ArgumentError(f"features={name!r} is no nn.Module; it cannot take weights")
    if path.suffix != ".safetensors":
        raise ArgumentError(
            f"feature_weights={str(path)!r} must be a .safetensors file: no pickle is loaded. "
            "Convert it once: safetensors.torch.save_file(torch.load(path, weights_only=True), ...)"
        )
    try:
        network.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ArgumentError(f"feature_weights={str(path)!r} do not fit {name}: {reason}") from error
