"""The run folder: config.yaml, metrics.csv, loss.png, README.md, samples/, checkpoints/."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import sys
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import Dataset

from sdeflow.denoiser import Denoiser
from sdeflow.errors import ArgumentError

from . import checkpoint
from .files import replace, replace_text
from .installed import check_installed, is_ink
from .loop import Record
from .recipe import Recipe
from .state import State, under

COLUMNS = [f.name for f in dataclasses.fields(Record)]

Resume = bool | Literal["auto"]


class Run:
    """A folder with everything that belongs to one training run.

    path: the folder. recipe: what its config.yaml says. resumes: whether it goes on from a
    checkpoint, as `create` found. lead: whether this process writes the files. passed_over: damaged
    checkpoints, to be renamed aside as soon as a new one is written.
    """

    def __init__(self, path: Path, recipe: Recipe, resumes: bool = False) -> None:
        self.path = path
        self.recipe = recipe
        self.resumes = resumes
        self.lead = True
        self.passed_over: list[Path] = []

    @classmethod
    def create(
        cls,
        path: str | Path,
        recipe: Recipe,
        resume: Resume = False,
        allow_changes: bool = False,
    ) -> Run:
        """A new run, or one that goes on; a folder that holds checkpoints is never written over.

        resume: True goes on from the last checkpoint, False begins, "auto" does what fits.
        allow_changes: whether a run may go on by another recipe than it began with; steps, places
        and intervals may change in any case.
        """
        path = Path(path)
        resumes = begun(path, resume)
        if resumes:
            old = Recipe.load(path / "config.yaml")
            different = old.differences(recipe)
            if different and not allow_changes:
                lines = "\n".join(f"  {line}" for line in _changes(old, recipe, different))
                raise ArgumentError(
                    f"resume: the recipe is not the one that {path} was begun with:\n{lines}\n"
                    f"Go on as before with --config {path / 'config.yaml'}, by the new recipe with "
                    "--allow_changes, or train in another folder"
                )
            for line in _changes(old, recipe):
                say(f"resume: {line}")
        for folder in ("checkpoints", "posthoc"):
            checkpoint.sweep(path / folder)
        run = cls(path, recipe, resumes)
        if not resumes:  # else once the checkpoint is found to fit
            run.write_config()
        return run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """The run in a folder."""
        config = Path(path) / "config.yaml"
        if not config.is_file():
            raise ArgumentError(f"run={str(path)!r} holds no config.yaml; train it first")
        return cls(Path(path), Recipe.load(config))

    def write_config(self) -> None:
        """Write config.yaml; one that says anything else lives on as config.yaml.N."""
        self.path.mkdir(parents=True, exist_ok=True)
        if aside := replace_text(self.path / "config.yaml", self.recipe.text()):
            say(f"{self.path / 'config.yaml'} is new; the one before is {aside.name}")

    # ---- checkpoints

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def save(self, state: State, facts: dict[str, Any] | None = None) -> None:
        """Write a checkpoint, and remove those beyond `recipe.keep`, but never the best.

        Of several processes all call this. facts: what belongs to it beside the state;
        {"best": {"step": ..., "loss": ...}} names the best one.
        """
        facts = facts or {}
        tensors, own = state.pack()
        if self.recipe.strategy == "fsdp":
            from . import sharded

            sharded.write(self.checkpoints, state.step, tensors, {**own, **facts})
        elif self.lead:
            checkpoint.write(self.checkpoints, state.step, tensors, {**own, **facts})
        if self.lead:
            for manifest in self.passed_over:
                if manifest.exists():
                    checkpoint.set_aside(manifest)
            self.passed_over.clear()
            self.tidy(facts.get("best"))

    def tidy(self, best: dict[str, Any] | None) -> None:
        """Name the best checkpoint, and remove those beyond `recipe.keep`."""
        if best:
            name = f"{checkpoint.stem(best['step'])}.json"
            body = json.dumps({**best, "manifest": name, "loss is": SMOOTHED}, indent=1)
            replace(self.checkpoints / "best.json", body.encode())
        checkpoint.prune(self.checkpoints, self.recipe.keep, best["step"] if best else None)

    def load(self, state: State) -> tuple[int, dict[str, Any]]:
        """Take over the last checkpoint that is whole and fits; returns its step and its facts.

        What ails later ones is told on stderr. Of several processes all call this.
        """
        if self.recipe.strategy == "fsdp":
            from . import sharded

            manifest, complaints = sharded.newest_valid(self.checkpoints)
            step, tensors, facts = sharded.read(manifest, state)
        else:
            manifest, step, tensors, facts, complaints = checkpoint.newest(
                self.checkpoints, lambda found, _: misfits(state, found)
            )
        state.unpack(step, tensors, facts)
        found = checkpoint.manifests(self.checkpoints)
        self.passed_over = [m for m in found if checkpoint.step_of(m) > step]
        if self.lead:
            _warn(manifest, complaints)
            self.write_config()
            if not self.passed_over:  # the run may have been killed before it did this
                self.tidy(facts.get("best"))
        return step, facts

    def network(self, device: torch.device | str = "cpu", best: bool = False) -> nn.Module:
        """The trained network alone, with the averaged weights; `classes` says if it takes labels.

        best: the checkpoint of the lowest smoothed loss instead of the last one.
        """
        return self._restore(device, best)[0]

    def denoiser(
        self, device: torch.device | str = "cpu", best: bool = False
    ) -> tuple[Denoiser, tuple[int, ...]]:
        """The trained denoiser, with the averaged weights, and the shape of one sample."""
        network, shape = self._restore(device, best)
        return self.recipe.make_denoiser(network), shape

    def _restore(self, device: torch.device | str, best: bool) -> tuple[nn.Module, tuple[int, ...]]:
        check_installed(self.recipe, ("network", "sde"), self.origins)
        if best:
            manifest = self._best()
            _, tensors, facts = checkpoint.read(manifest)
        else:
            manifest, _, tensors, facts, complaints = checkpoint.newest(self.checkpoints)
            _warn(manifest, complaints)
        shape, classes = tuple(facts["shape"]), facts.get("classes", 0)
        network = self.recipe.make_network(shape, classes)
        weights = under("ema.", tensors)
        expected = checkpoint.table(network.state_dict())
        if problems := checkpoint.differences(expected, checkpoint.table(weights)):
            raise checkpoint.refusal(manifest, "does not fit the network of config.yaml", problems)
        network.load_state_dict(weights)
        if not hasattr(network, "classes"):
            network.classes = classes
        self.facts = facts
        return network.to(device).eval(), shape

    def _best(self) -> Path:
        """The manifest that best.json names."""
        try:
            name = json.loads((self.checkpoints / "best.json").read_bytes())["manifest"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise checkpoint.CheckpointError(
                f"{self.checkpoints / 'best.json'} cannot be read ({error}); leave out best, which "
                "takes the last checkpoint"
            ) from error
        return self.checkpoints / Path(name).name

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the last whole checkpoint says beside the weights."""
        manifest, complaints = checkpoint.newest_valid(self.checkpoints)
        _warn(manifest, complaints)
        return checkpoint.read_manifest(manifest)["facts"]

    # ---- data and plugins

    def origins(self) -> dict[str, str]:
        """The distributions that offered the recipe's plugins, if a checkpoint can say."""
        try:
            return dict(self.facts.get("plugins", {}))
        except checkpoint.CheckpointError:
            return {}

    def dataset(self, split: str = "train") -> Dataset:
        """The run's data set."""
        check_installed(self.recipe, ("data",), self.origins)
        return self.recipe.make_dataset(split)

    @property
    def ink(self) -> bool:
        """Whether the run's images are drawn dark on light."""
        if "ink" not in self.facts:
            return is_ink(self.recipe)
        return bool(self.facts["ink"])

    @property
    def class_names(self) -> list[str]:
        """What the classes of a conditional run are called, in order; their numbers if unknown."""
        return self.facts.get("class_names") or list(map(str, range(self.facts.get("classes", 0))))

    # ---- metrics

    @property
    def metrics(self) -> Path:
        """The table of the losses."""
        return self.path / "metrics.csv"

    def read_metrics(self) -> list[Record]:
        """The records of metrics.csv; a last line that was cut off while written is left out."""
        if not self.metrics.exists():
            return []
        text = self.metrics.read_text(encoding="utf-8")
        records = []
        for number, line in enumerate(text.split("\n")[1:-1], 2):
            try:
                step, *values = line.split(",")
                records.append(Record(int(step), *map(float, values)))
            except (ValueError, TypeError) as error:
                raise ArgumentError(
                    f"{self.metrics} line {number} is {line!r}, not {','.join(COLUMNS)} ({error}); "
                    "mend it, or remove the file to go on without what came before"
                ) from error
        return records

    def write_metrics(self, records: Iterable[Record], append: bool = True) -> None:
        """Add records to metrics.csv, or write it anew in one go."""
        new = not append or not self.metrics.exists()
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        writer.writerows([getattr(record, name) for name in COLUMNS] for record in records)
        if new:
            replace(self.metrics, buffer.getvalue().encode())
        else:
            with self.metrics.open("a", newline="", encoding="utf-8") as file:
                file.write(buffer.getvalue())


SMOOTHED = "the exponential mean of the losses in metrics.csv up to that step, 0.9 a line"


def begun(path: Path, resume: Resume) -> bool:
    """Whether the folder holds checkpoints; an error where that is not what `resume` says."""
    found = bool(checkpoint.manifests(path / "checkpoints"))
    if resume is True and not found:
        raise ArgumentError(
            f"resume: {path} holds no checkpoint; leave resume out to begin, or use --resume auto"
        )
    if found and not resume:
        raise ArgumentError(
            f"run: {path} holds checkpoints already; go on from them with --resume, or choose "
            "another folder"
        )
    return found


def misfits(state: State, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Every way in which a checkpoint's tensors are not those of the state."""
    expected = {n: what for n, what in checkpoint.table(state.pack()[0]).items() if _plain(n)}
    found = {n: what for n, what in checkpoint.table(tensors).items() if _plain(n)}
    lines = checkpoint.differences(expected, found)
    parameters = dict(enumerate(state.network.parameters()))
    slots: dict[str, set[str]] = {}
    for name, tensor in under("optimizer.", tensors).items():
        index, _, slot = name.partition(".")
        like = parameters.get(int(index)) if index.isdecimal() else None
        slots.setdefault(slot, set()).add(index)
        if like is None:
            lines.append(f"unexpected: optimizer.{name}")
        elif tensor.ndim and tensor.shape != like.shape:
            lines.append(f"optimizer.{name} is {tuple(tensor.shape)}, expected {tuple(like.shape)}")
    every = set().union(*slots.values())
    return (
        lines
        + [
            f"missing: optimizer.{index}.{slot}"
            for slot, indices in slots.items()
            for index in sorted(every - indices)
        ]
        + ([] if slots else ["missing: optimizer.* (the optimizer's memory)"])
    )


def _plain(name: str) -> bool:
    return not name.startswith("optimizer.")


def _changes(old: Recipe, new: Recipe, names: Iterable[str] | None = None) -> list[str]:
    """`name: old -> new` for each option that differs."""
    names = [f.name for f in dataclasses.fields(old)] if names is None else list(names)
    pairs = ((n, getattr(old, n), getattr(new, n)) for n in names)
    return [f"{name}: {before!r} -> {now!r}" for name, before, now in pairs if before != now]


def say(text: str) -> None:
    """A word to the user, on stderr."""
    print(f"sdeflow: {text}", file=sys.stderr)


def _warn(manifest: Path, complaints: list[str]) -> None:
    """Say which checkpoints were passed over, and which one is used."""
    for complaint in complaints:
        say(f"warning: {complaint}")
    if complaints:
        say(f"warning: {manifest} is used instead, the last one that is whole")


def pick_device(device: str) -> torch.device:
    """The device of that name; auto is CUDA where there is one."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("device='cuda': torch sees no CUDA device here; use auto or cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
