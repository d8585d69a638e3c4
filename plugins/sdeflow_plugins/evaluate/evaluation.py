"""The evaluation of a run: samples drawn by seeds, measured, written down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdeflow.errors import ArgumentError

from ..generate.sampler import Sampler
from ..pictures import is_image, save_samples
from ..train.files import replace
from ..train.run import Run
from .draw import balanced, classes_of, draw
from .features import fingerprint
from .figures import draw_classes, draw_nearest, draw_points
from .panel import Measured, Panel
from .report import class_table, plain, seed_range, table, versions


@dataclass(frozen=True)
class Column:
    """One set of samples and what it measures.

    labels: the class that each sample was asked to be, if any. how: what made the samples, as JSON
    takes it.
    """

    name: str
    x: Tensor
    labels: Tensor | None
    measured: Measured
    how: dict[str, Any] = field(default_factory=dict)


def evaluate_run(
    run: Run,
    panel: Panel,
    sampler: Sampler,
    steps: int,
    seeds: Sequence[int],
    guidance: Sequence[float] = (1.0,),
    replicates: int = 200,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> list[Column]:
    """Draw samples of a run and measure them: one column for each weight of guidance.

    Samples of a conditional run are asked for all classes in turn.
    """
    denoiser, shape = run.denoiser(device)
    classes = classes_of(denoiser)
    check_guidance(classes, guidance)
    labels = balanced(len(seeds), panel.train) if classes else None
    columns = []
    for w in guidance:
        name = f"guidance {w:g}" if classes else "samples"
        bar = name if progress else ""
        x, evaluations = draw(
            denoiser, shape, sampler, steps, seeds, labels, w, device, progress=bar
        )
        how = {"seeds": seed_range(seeds), "steps": steps, "evaluations": evaluations}
        how |= {"sampler": asdict(sampler), "weights": fingerprint(denoiser.net)}  # type: ignore[arg-type]
        if classes:
            how["guidance"] = w
        asked = labels if w else None  # w = 0 asks for no class
        columns.append(Column(name, x, asked, panel.measure(x, asked, replicates), how))
    return columns


def check_guidance(classes: int, guidance: Sequence[float]) -> None:
    """Refuse weights of guidance for a run that knows no classes, and an empty list of them."""
    if not guidance:
        raise ArgumentError("guidance=[] is empty; give one weight or more, such as '[1, 2]'")
    if not classes and any(w != 1 for w in guidance):
        raise ArgumentError(
            f"guidance={list(guidance)}: the run is unconditional; leave guidance out, or train "
            "with --conditional true"
        )


def write_evaluation(
    run: Run, panel: Panel, columns: Sequence[Column], path: Path, replicates: int = 200
) -> str:
    """Write the figures as JSON, and pictures beside; returns the table.

    The pictures show the samples, and those that are nearest to training data.
    """
    floor = panel.floor(len(columns[0].x), replicates)
    found = {
        "run": run.path.name,
        "data": {
            "name": run.recipe.data,
            "options": run.recipe.data_options,
            "train": len(panel.train),
            "held_out": len(panel.test),
            "used_for_distances": {"train": len(panel.real), "held_out": len(panel.held_out)},
        },
        "features": {
            "name": panel.features.name,
            "number": panel.held_features.shape[1],
            "weights": panel.features.version,
        },
        "judge_accuracy": panel.judge_accuracy,
        "columns": [
            {"name": c.name, "samples": len(c.x), **c.how, **plain(c.measured)} for c in columns
        ],
        "real": plain(floor),
        "left_out": panel.left_out,
        "notes": panel.notes,
        "error_bars": {
            "kind": "standard deviation of bootstrap replicates",
            "replicates": replicates,
            "seed": 0,
        },
        "versions": versions(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, (json.dumps(found, indent=1, default=str) + "\n").encode())
    for column in columns:
        ending = "" if len(columns) == 1 else f"_{column.name.replace(' ', '_')}"
        _draw(run, panel, column, path.with_name(f"{path.stem}{ending}.png"))
    return text_of(panel, columns, floor)


def text_of(panel: Panel, columns: Sequence[Column], floor: Measured) -> str:
    """The evaluation as a person reads it."""
    sets = {c.name: c.measured for c in columns} | {"real data": floor}
    parts = [table({name: m.metrics for name, m in sets.items()})]
    if any(c.measured.per_class for c in columns):
        parts.append(class_table({name: m.per_class for name, m in sets.items()}))
    features = panel.features.name
    if panel.judge_accuracy is not None:
        features += f"; judge right on {panel.judge_accuracy:.1%} of the held-out data"
    against = f"against {len(panel.held_out)} held-out samples"
    foot = [f"{against}; ± one standard error; features: {features}"]
    n = len(columns[0].x)
    if any(e.error == 0 for c in columns for e in c.measured.metrics.values()):
        foot.append(
            f"a share of exactly 0 or 1 has no bootstrap error: of {n} samples it says, 95 % sure, "
            f"that the true one is within {3 / n:.2%} of it"
        )
    foot += [f"note: {note}" for note in panel.notes]
    foot += [f"left out: {name}: {why}" for name, why in panel.left_out.items()]
    return "\n\n".join([*parts, "\n".join(foot)])


def _draw(run: Run, panel: Panel, column: Column, path: Path) -> None:
    """The samples, one class a column; and those nearest to training data beside these."""
    if panel.shape == (2,):
        draw_points(column.x, column.labels, panel.class_name, path)
    if not is_image(panel.shape):
        return
    if column.labels is not None:
        draw_classes(column.x, column.labels, panel.class_name, path, run.ink)
    else:
        save_samples(column.x[:100], path, ink=run.ink)
    near = column.measured.neighbours
    if near is not None:
        beside = path.with_name(f"{path.stem}_nearest.png")
        draw_nearest(column.x, near, panel.train, beside, ink=run.ink)
