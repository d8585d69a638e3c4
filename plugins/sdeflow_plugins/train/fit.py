"""Training in memory: a recipe and a data set in, a denoiser out, nothing written."""

from __future__ import annotations

from torch.utils.data import Dataset

from sdeflow.denoiser import Denoiser

from .engine import make_fabric
from .loop import Loss, training
from .recipe import Recipe
from .state import State


def fit(
    recipe: Recipe, dataset: Dataset | None = None, loss: Loss | None = None, quiet: bool = False
) -> Denoiser:
    """The denoiser with the averaged weights after recipe.steps, on the host and ready to sample.

    dataset: anything with `shape`, `len` and `[i]` (and `labels`, for a conditional recipe); by
        default the recipe's own. loss: as for `training`, the loop inside, which a program that
        wants to save, log or stop runs itself. quiet: no progress bar.
    """
    from tqdm.auto import tqdm

    dataset = recipe.make_dataset() if dataset is None else dataset
    fabric, classes = make_fabric(recipe), recipe.count_classes(dataset)
    state = State.fresh(recipe, dataset.shape, fabric.device, classes)  # type: ignore[attr-defined]
    steps = training(recipe, dataset, state, fabric, loss)
    with tqdm(steps, desc="train", total=recipe.steps, unit="step", disable=quiet) as bar:
        for record in bar:
            if record.step % recipe.log_every == 0:
                bar.set_postfix(loss=f"{record.loss:.4f}")
    return recipe.make_denoiser(state.ema.module.eval().cpu())
