"""The run folder: config.yaml, metrics.csv, loss.png, samples/, checkpoints/."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import astuple, fields
from pathlib import Path

import torch
from torch.utils.data import Dataset

from sdeflow.denoiser import Denoiser
from sdeflow.errors import ArgumentError
from sdeflow.plugins import plugins

from . import checkpoint
from .loop import Record
from .recipe import Recipe
from .state import State, under

COLUMNS = [f.name for f in fields(Record)]


class Run:
    """A folder with everything that belongs to one training run.

    path: the folder. recipe: what its config.yaml says.
    """

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        self.recipe = recipe

    @classmethod
    def create(cls, path: str | Path, recipe: Recipe, resume: bool = False) -> Run:
        """A new run, or one that goes on: `resume` asks that the recipe is that of the folder.

        A folder that holds checkpoints is never written over.
        """
        path = Path(path)
        begun = bool(checkpoint.manifests(path / "checkpoints"))
        if resume and not begun:
            raise ArgumentError(f"resume: {path} holds no checkpoint; leave resume out to begin")
        if begun and not resume:
            raise ArgumentError(
                f"run: {path} holds checkpoints already; go on from them with --resume true, or "
                "choose another folder"
            )
        if resume:
            old = Recipe.load(path / "config.yaml")
            if different := old.differences(recipe):
                pairs = ", ".join(f"{n}={getattr(old, n)!r}" for n in different)
                raise ArgumentError(
                    f"resume: {path} was trained with {pairs}; resume with "
                    f"--config {path / 'config.yaml'}, or train in another folder"
                )
        path.mkdir(parents=True, exist_ok=True)
        recipe.save(path / "config.yaml")
        return cls(path, recipe)

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """The run in a folder."""
        config = Path(path) / "config.yaml"
        if not config.is_file():
            raise ArgumentError(f"run={str(path)!r} holds no config.yaml; train it first")
        return cls(Path(path), Recipe.load(config))

    # ---- checkpoints

    def save(self, state: State) -> Path:
        """Write a checkpoint, and remove all but the last two."""
        folder = self.path / "checkpoints"
        manifest = checkpoint.write(folder, state.step, *state.pack())
        checkpoint.prune(folder)
        return manifest

    def load(self, state: State) -> None:
        """Take over the last checkpoint."""
        state.unpack(*checkpoint.read(checkpoint.latest(self.path / "checkpoints")))

    def denoiser(self, device: torch.device | str = "cpu") -> tuple[Denoiser, tuple[int, ...]]:
        """The trained denoiser, with the averaged weights, and the shape of one sample."""
        _, tensors, facts = checkpoint.read(checkpoint.latest(self.path / "checkpoints"))
        shape = tuple(facts["shape"])
        network = self.recipe.make_network(shape)
        network.load_state_dict(under("ema.", tensors))
        return self.recipe.make_denoiser(network.to(device).eval()), shape

    def dataset(self, split: str = "train") -> Dataset:
        """The run's data set."""
        return self.recipe.make_dataset(split)

    @property
    def ink(self) -> bool:
        """Whether the run's images are drawn dark on light."""
        factory = plugins().find("dataset", self.recipe.data).factory
        return bool(getattr(factory, "ink", False))

    # ---- metrics

    @property
    def metrics(self) -> Path:
        """The table of the losses."""
        return self.path / "metrics.csv"

    def read_metrics(self) -> list[Record]:
        """The records of metrics.csv."""
        if not self.metrics.exists():
            return []
        with self.metrics.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file)][1:]
        return [Record(int(row[0]), *map(float, row[1:])) for row in rows]

    def write_metrics(self, records: Iterable[Record], append: bool = True) -> None:
        """Add records to metrics.csv, or begin it anew."""
        new = not append or not self.metrics.exists()
        with self.metrics.open("w" if new else "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(COLUMNS)
            writer.writerows(astuple(record) for record in records)


def pick_device(device: str) -> torch.device:
    """The device of that name; auto is CUDA where there is one."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("device='cuda': torch sees no CUDA device here; use auto or cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
