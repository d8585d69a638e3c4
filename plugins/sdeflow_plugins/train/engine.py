"""The engine: Lightning Fabric for a recipe, in one process or under torchrun."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from sdeflow.errors import ArgumentError

from .recipe import Recipe

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def make_fabric(recipe: Recipe) -> Fabric:
    """Lightning Fabric for the recipe's device and precision; under torchrun, for all ranks."""
    try:
        from lightning_fabric import Fabric
    except ImportError as error:
        raise ArgumentError(
            f"training needs lightning-fabric ({error}); pip install 'sdeflow[images]'"
        ) from error
    cuda = torch.cuda.is_available() and recipe.device != "cpu"
    precision = recipe.precision
    if precision == "auto":  # on CPUs bf16 gave 15 % on one core, less than nothing on two
        precision = "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
    fabric = Fabric(
        accelerator="cuda" if cuda else "cpu",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", 1)),
        precision="bf16-mixed" if precision == "bf16" else "32-true",
    )
    fabric.launch()
    return fabric
