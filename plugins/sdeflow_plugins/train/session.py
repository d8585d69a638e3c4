"""One training run from end to end: the loop's records on a bar, in files and in pictures."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from sdeflow.errors import ArgumentError

from .card import write_card
from .engine import close, describe, distribute, make_fabric
from .installed import check_installed, is_ink, origins
from .lock import locked
from .loop import Record, training
from .posthoc import take_snapshot
from .recipe import Recipe
from .run import Resume, Run, begun
from .signals import Signals
from .state import State
from .watch import Watch, board_writer

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass
class Progress:
    """What a run remembers beside the state, so that its files are those of an unbroken one.

    records: the lines of metrics.csv. window: the steps since the last of them.
    best: step and smoothed loss of the best checkpoint. seconds: of training, over all sessions.
    """

    records: list[Record] = field(default_factory=list)
    window: list[Record] = field(default_factory=list)
    best: dict[str, Any] | None = None
    seconds: float = 0.0
    since: float = field(default_factory=time.monotonic)

    def resume(self, run: Run, step: int, facts: dict[str, Any]) -> None:
        """Take over what belongs to the checkpoint of a step."""
        self.records = [record for record in run.read_metrics() if record.step <= step]
        self.window = [Record(*row) for row in facts.get("window", [])]
        self.seconds = facts.get("seconds", 0.0)
        best = facts.get("best")
        if best and (run.checkpoints / f"step_{best['step']:08d}.json").exists():
            self.best = best

    def close_window(self) -> Record:
        """The next line of metrics.csv: mean loss and gradient norm, the last step and rate."""
        n = len(self.window)
        line = Record(
            step=self.window[-1].step,
            loss=sum(r.loss for r in self.window) / n,
            grad_norm=sum(r.grad_norm for r in self.window) / n,
            lr=self.window[-1].lr,
        )
        self.window.clear()
        self.records.append(line)
        return line

    def facts(self, step: int) -> dict[str, Any]:
        """For the checkpoint of a step; from now on the best one may be this."""
        if self.records:
            loss = smoothed(self.records)
            if self.best is None or loss <= self.best["loss"]:
                self.best = {"step": step, "loss": loss}
        now = time.monotonic()
        self.seconds, self.since = self.seconds + now - self.since, now
        window = [[r.step, r.loss, r.grad_norm, r.lr] for r in self.window]
        return {"window": window, "best": self.best, "seconds": self.seconds}


def smoothed(records: list[Record], decay: float = 0.9) -> float:
    """The exponential mean of the losses: the last one has weight 1, the one before `decay`, ..."""
    total = weight = 0.0
    for record in records:
        total, weight = decay * total + record.loss, decay * weight + 1
    return total / weight


def train_run(
    path: str | Path,
    recipe: Recipe,
    resume: Resume = False,
    quiet: bool = False,
    allow_changes: bool = False,
) -> Run:
    """Train by a recipe in a run folder, or go on there; returns the run.

    Every `log_every` steps a line goes to metrics.csv, every `save_every` steps and at the end a
    checkpoint is written, with a picture of samples and the loss curve; at the end a model card.

    resume: True goes on from the folder's last checkpoint, "auto" begins where there is none.
    allow_changes: whether to go on by another recipe than the run began with.
    quiet: no bar and no closing line; warnings still go to stderr.

    SIGINT and SIGTERM, in the main thread, end the run after the step in hand with a checkpoint,
    by KeyboardInterrupt and SystemExit(143). For a body of one's own, the loop is a generator:

        dataset, fabric = recipe.make_dataset(), make_fabric(recipe)
        state = State.fresh(recipe, dataset.shape, fabric.device, recipe.count_classes(dataset))
        run = Run.create("runs/mine", recipe, resume="auto")
        if run.resumes:
            run.load(state)
        for record in training(recipe, dataset, state, fabric):
            if record.step % 100 == 0:
                print(record.step, record.loss)
                run.save(state)
    """
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    check_installed(recipe)
    dataset = recipe.make_dataset()
    if recipe.strategy == "fsdp" and recipe.posthoc_every:
        raise ArgumentError(
            f"posthoc_every={recipe.posthoc_every} needs the weights whole in one process; "
            "strategy='fsdp' shards them: use ddp, or posthoc_every=0"
        )
    if recipe.tensorboard:
        board_writer()
    recipe.make_sde()  # a wrong name or option is told before anything is written
    shape, classes = dataset.shape, recipe.count_classes(dataset)  # type: ignore[attr-defined]
    fabric = make_fabric(recipe)
    state = State.fresh(recipe, shape, fabric.device, classes)
    distribute(state, fabric)
    lead = fabric.is_global_zero
    if lead and not quiet:
        print(f"training in {describe(fabric)}")
    if lead:
        begun(Path(path), resume)
    with (
        locked(Path(path)) if lead else contextlib.nullcontext(),
        Signals(fabric) as signals,
    ):
        run = Run(Path(path), recipe)
        if lead:
            run = Run.create(path, recipe, resume, allow_changes)
        run.lead = lead
        run.resumes = bool(fabric.broadcast(run.resumes))
        progress = Progress()
        if run.resumes:
            progress.resume(run, *run.load(state))
        _train(run, dataset, state, fabric, signals, progress, quiet or not lead)
    close(fabric)
    if signals.caught:
        if lead and not quiet:
            print(
                f"stopped at step {state.step}, with a checkpoint; go on with: "
                f"sdeflow train {run.path} --config {run.path / 'config.yaml'} --resume"
            )
        signals.leave()
    if lead and not quiet:
        print(f"trained to step {state.step}; sample it with: sdeflow sample {run.path}")
    return run


def _train(
    run: Run,
    dataset: Dataset,
    state: State,
    fabric: Fabric,
    signals: Signals,
    progress: Progress,
    quiet: bool,
) -> None:
    """The loop, with everything that is done between its steps."""
    recipe, lead = run.recipe, fabric.is_global_zero
    about = {
        "class_names": list(getattr(dataset, "class_names", [])) if state.classes else [],
        "ink": is_ink(recipe),
        "rows": len(dataset),  # type: ignore[arg-type]
        "plugins": origins(recipe),
        "engine": describe(fabric),
    }
    if lead:
        run.write_metrics(progress.records, append=False)
    watch = Watch(run, state, about, quiet) if lead else None
    steps, begun_at = training(recipe, dataset, state, fabric), state.step
    try:
        for record in steps:
            progress.window.append(record)
            last, stop = record.step == recipe.steps, signals.stop()
            if record.step % recipe.log_every == 0 or last:
                line = progress.close_window()
                if watch:
                    run.write_metrics([line])
                    watch.log(line)
            start = time.monotonic()
            saves = record.step % recipe.save_every == 0 or last
            if saves or stop:
                run.save(state, {**about, **progress.facts(record.step)})
            if recipe.posthoc_every and record.step % recipe.posthoc_every == 0 and lead:
                take_snapshot(run.path / "posthoc", state)
            if watch:
                shows = record.step % recipe.preview_every == 0 if recipe.preview_every else saves
                if shows and not last:
                    watch.draw(progress.records, fabric.device)
                watch.step(time.monotonic() - start)
            if stop:
                break
        made = state.step > begun_at or not (run.path / "README.md").exists()
        if watch and made and state.step == recipe.steps and progress.records:
            watch.draw(progress.records, fabric.device)
            facts = {**about, **progress.facts(state.step)}
            write_card(run, state, progress.records[-1], facts)
    finally:
        steps.close()  # type: ignore[attr-defined]
        if watch:
            watch.close()
