"""The command `sdeflow train`; its signature is the command line."""

from __future__ import annotations

from typing import Any

from .recipe import Recipe
from .session import train_run


def train(run: str, resume: bool = False, **recipe: Any) -> None:
    """Train a network by denoising score matching, into a run folder.

    Writes config.yaml, metrics.csv, loss.png, samples/ and checkpoints/ there. The run's
    config.yaml can be given back with --config, and options after it win. Examples:

        sdeflow train runs/digits
        sdeflow train runs/moons --data moons --network mlp --batch_size 256
        sdeflow train runs/cats --data folder --data_options.path ~/cats --data_options.size 32
        sdeflow train runs/digits --config runs/digits/config.yaml --resume true

    Args:
        run: the run folder, such as runs/digits.
        resume: go on from the last checkpoint of the folder.
    """
    train_run(run, Recipe(**recipe), resume)
