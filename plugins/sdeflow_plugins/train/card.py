"""The model card: README.md of a run folder, what was trained on what, and how to sample it."""

from __future__ import annotations

import hashlib
import platform
from typing import Any

import torch

from .files import replace, replace_text
from .loop import Record
from .run import Run
from .state import State

SIGN = "\n<!-- as written by sdeflow: "


def write_card(run: Run, state: State, line: Record, facts: dict[str, Any]) -> None:
    """Write the model card; one that the user has changed lives on as README.md.N.

    line: the last one of metrics.csv. facts: what the last checkpoint says beside the weights.
    """
    path, text = run.path / "README.md", card(run, state, line, facts)
    signed = text + _mark(text)
    if path.is_file():
        old, _, mark = path.read_text(encoding="utf-8").rpartition(SIGN)
        if SIGN + mark == _mark(old):  # as it was written: nobody's work is lost
            replace(path, signed.encode())
            return
    replace_text(path, signed)


def _mark(text: str) -> str:
    """A comment by which a card that nobody has changed is known."""
    return f"{SIGN}{hashlib.sha256(text.encode()).hexdigest()[:16]} -->\n"


def card(run: Run, state: State, line: Record, facts: dict[str, Any]) -> str:
    """The text of the model card, in Markdown."""
    table = "\n".join(
        f"| {name} | {value.replace('|', chr(92) + '|')} |"
        for name, value in rows(run, state, line, facts).items()
    )
    pictures = [f"samples/step_{state.step:08d}.png", "loss.png"]
    shown = "\n\n".join(f"![]({name})" for name in pictures if (run.path / name).exists())
    samples = f"    sdeflow sample {run.path} --n 64 --solver dpmpp_2m --steps 20"
    if state.classes:
        samples += f"\n    sdeflow sample {run.path} --n 64 --class 0 --guidance 2.0"
    return f"""# {run.path.resolve().name}

A diffusion model, trained with sdeflow.

| | |
|---|---|
{table}

{shown}

## How to sample it

{samples}

In Python:

{_snippet(run, state)}

To train it further, by the same recipe but for the number of steps:

    sdeflow train {run.path} --config {run.path / "config.yaml"} --resume --steps {2 * state.step}

## Licence

To be filled in: that of the weights, and that of the data they were trained on.
"""


def rows(run: Run, state: State, line: Record, facts: dict[str, Any]) -> dict[str, str]:
    """The rows of the card's table."""
    from sdeflow import __version__

    recipe = run.recipe
    names = ", ".join(facts["class_names"][:20]) + ", ..." * (len(facts["class_names"]) > 20)
    average = f"{recipe.ema:g}, less early on"
    if recipe.ema_kind == "power":
        average = f"power, relative width {recipe.ema_width:g}"
    best = facts["best"]
    found = {
        "data": f"{_named(recipe.data, recipe.data_options)}: {facts['rows']:,} samples of shape "
        f"{tuple(state.shape)}",
        "classes": f"{state.classes}{names and f' ({names})'}, label dropout "
        f"{recipe.label_dropout:g}",
        "forward SDE": _named(recipe.sde, recipe.sde_options),
        "prediction": f"{recipe.prediction}; times {recipe.times}, weighting {recipe.weighting}",
        "network": f"{_named(recipe.network, recipe.network_options)}: "
        f"{sum(p.numel() for p in state.network.parameters()):,} parameters",
        "training": f"{state.step:,} steps of {recipe.batch_size:,} samples, AdamW at "
        f"{recipe.lr:g} ({recipe.schedule}), seed {recipe.seed}",
        "moving average": f"of the weights, decay {average}",
        "last loss": f"{line.loss:.4g}, over the last line of metrics.csv",
        "best loss": f"{best['loss']:.4g}, smoothed, at step {best['step']:,}",
        "time": f"{_duration(facts['seconds'])} with {facts['engine']}",
        "versions": f"sdeflow {__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}",
    }
    return {name: value for name, value in found.items() if state.classes or name != "classes"}


def _snippet(run: Run, state: State) -> str:
    """Python lines that draw 16 samples."""
    if not state.classes:
        imports, make = "", ["denoiser, shape = run.denoiser()"]
    else:
        imports = "from functools import partial\n\n    import torch\n    "
        make = [
            f"network, shape = run.network(), {tuple(state.shape)}",
            "label = torch.zeros(16, dtype=torch.long)  # 16 of class 0",
            "denoiser = run.recipe.make_denoiser(partial(network, label=label))",
        ]
    lines = [
        f"{imports}from sdeflow import probability_flow, sample",
        "from sdeflow_plugins.train.run import Run",
        "",
        f"run = Run.open({str(run.path)!r})",
        *make,
        "flow = probability_flow(denoiser.sde, denoiser)",
        'x = sample(flow, (16, *shape), solver="dpmpp_2m", grid="log_snr", steps=20, seed=0).x',
    ]
    return "\n".join(f"    {line}".rstrip() for line in lines)


def _named(name: str, options: dict[str, Any]) -> str:
    """A plugin with its options: `vp` (beta_max=15)."""
    told = ", ".join(f"{key}={value!r}" for key, value in options.items())
    return f"`{name}`" + (f" ({told})" if told else "")


def _duration(seconds: float) -> str:
    """Seconds as one says them: 45 s, 12 min, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
