"""One training run from end to end: the loop's records put on a bar, in files and in pictures."""

from __future__ import annotations

from pathlib import Path

import torch

from sdeflow.denoiser import Denoiser

from ..generate.sampler import Sampler
from ..pictures import is_image, loss_curve, save_samples
from .engine import make_fabric
from .loop import Record, training
from .recipe import Recipe
from .run import Run
from .state import State

PREVIEWS = 64


def train_run(path: str | Path, recipe: Recipe, resume: bool = False, quiet: bool = False) -> Run:
    """Train by a recipe in a run folder, or go on there; returns the run.

    Every `log_every` steps a line goes to metrics.csv, every `save_every` steps and at the end a
    checkpoint, a picture of samples and the loss curve are written.
    """
    from tqdm.auto import tqdm

    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    dataset = recipe.make_dataset()
    recipe.make_sde()  # a wrong name or option is told before anything is written
    fabric = make_fabric(recipe)
    state = State.fresh(recipe, dataset.shape, fabric.device)  # type: ignore[attr-defined]
    run = Run.create(path, recipe, resume) if fabric.is_global_zero else Run(Path(path), recipe)
    fabric.barrier()
    if resume:
        run.load(state)
    kept = [record for record in run.read_metrics() if record.step <= state.step]
    if fabric.is_global_zero:
        run.write_metrics(kept, append=False)
    bar = tqdm(
        training(recipe, dataset, state, fabric),
        initial=state.step,
        total=recipe.steps,
        desc="train",
        unit="step",
        disable=quiet or not fabric.is_global_zero,
    )
    window: list[Record] = []
    try:
        for record in bar:
            window.append(record)
            last = record.step == recipe.steps
            if record.step % recipe.log_every == 0 or last:
                kept.append(_mean(window))
                window.clear()
                bar.set_postfix(loss=f"{kept[-1].loss:.4f}", lr=f"{record.lr:.1e}")
                if fabric.is_global_zero:
                    run.write_metrics(kept[-1:])
            if fabric.is_global_zero and (record.step % recipe.save_every == 0 or last):
                run.save(state)
                loss_curve(kept, run.path / "loss.png")
                _preview(run, state, fabric.device, getattr(dataset, "ink", False))
    finally:
        bar.close()
    if fabric.is_global_zero and not quiet:
        print(f"trained to step {state.step}; sample it with: sdeflow sample {run.path}")
    return run


def _mean(window: list[Record]) -> Record:
    """One record for a log interval: the mean loss and gradient norm, the last step and rate."""
    n = len(window)
    return Record(
        step=window[-1].step,
        loss=sum(r.loss for r in window) / n,
        grad_norm=sum(r.grad_norm for r in window) / n,
        lr=window[-1].lr,
    )


def _preview(run: Run, state: State, device: torch.device, ink: bool) -> None:
    """Samples of the averaged weights, from the same noise at every checkpoint."""
    shape = state.shape
    if not is_image(shape) and shape != (2,):
        return
    network = state.ema.module
    was = network.training
    network.eval()
    denoiser: Denoiser = run.recipe.make_denoiser(network)
    n = PREVIEWS if is_image(shape) else 2048
    x = Sampler().run(denoiser, (n, *shape), steps=20, device=device).x
    network.train(was)
    save_samples(x, run.path / "samples" / f"step_{state.step:08d}.png", ink=ink)
