"""The command `sdeflow train`; its signature is the command line."""

from __future__ import annotations

from typing import Any, Literal

from .recipe import Recipe
from .session import train_run


def train(
    run: str, resume: bool | Literal["auto"] = False, allow_changes: bool = False, **recipe: Any
) -> None:
    """Train a network by denoising score matching, into a run folder.

    Writes config.yaml, metrics.csv, loss.png, README.md (a model card), samples/ and checkpoints/
    there. The run's config.yaml can be given back with --config, and options after it win. Ctrl-C
    and SIGTERM finish the step and write a checkpoint. Examples:

        sdeflow train runs/digits
        sdeflow train runs/moons --data moons --network mlp --batch_size 256
        sdeflow train runs/cats --data folder --data_options.path ~/cats --data_options.size 32
        sdeflow train runs/digits --config runs/digits/config.yaml --resume

    Args:
        run: the run folder, such as runs/digits.
        resume: go on from the last checkpoint of the folder; auto: if there is one, else begin.
        allow_changes: go on even where the recipe is not the one that the run was begun with.
    """
    train_run(run, Recipe(**recipe), resume, allow_changes=allow_changes)
