"""docs/names.md, from the tables of the plugin `presets`: python tools/names_table.py

What other libraries call our solvers and grids, and the samplers of the literature as presets. A
test holds the committed file to what this prints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdeflow_plugins.presets import GRID_ALIASES, NAMES, PRESETS

FILE = Path(__file__).parents[1] / "docs" / "names.md"
HEAD = """\
# Names

Written by `python tools/names_table.py`; do not edit.

## Solvers

A sampler elsewhere is a solver *and* a process here: "ode" stands for
`probability_flow(sde, score)`, "sde" for `reverse(sde, score)`, whose noise `eta` scales.
`get("solver", name)` and `solver=name` understand every name in this table (labels in lower case,
`dpmpp_2m_sde` for "DPM++ 2M SDE"), and `sdeflow list` prints them.

One word means two things: k-diffusion's and the web UIs' `heun` is Heun's method in sigma, our
`edm_heun`; our `heun` is Heun's method in time t, on any process. (A name of ours goes before a
name of others.)
"""
GRIDS = """\
## Grids

`to_zero=True` adds the last step to sigma = 0, which k-diffusion and the web UIs always make.
"""
PRESET = """\
## Presets

`get("preset", name).sample(sde, denoiser, shape)` runs one, and `sdeflow sample RUN --preset name`.
"""


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A table in markdown, its columns aligned."""
    cells = [head, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(head))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines) + "\n"


def code(name: str) -> str:
    """The name as code; nothing for nothing."""
    return f"`{name}`" if name else ""


def options(values: Any) -> str:
    """Options as they are written in a call."""
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def page() -> str:
    """The whole file."""
    solvers = [
        [
            code(row.solver),
            row.process,
            code(row.k_diffusion),
            code(row.diffusers and f"{row.diffusers}Scheduler"),
            row.label,
        ]
        for row in sorted(NAMES, key=lambda row: (row.solver, row.process))
    ]
    grids = [[code(name), code(other)] for other, name in sorted(GRID_ALIASES.items())]
    grids.append(["`arctan`, std=1", "`kl_optimal`"])
    presets = [
        [
            code(name),
            "sde" if p.eta else "ode",
            code(p.solver) + (p.solver_options and f", {options(p.solver_options)}" or ""),
            code(p.grid) + (p.grid_options and f", {options(p.grid_options)}" or ""),
            p.steps,
            p.evaluations,
            p.source,
        ]
        for name, p in PRESETS.items()
    ]
    return "\n".join(
        [
            HEAD,
            table(["sdeflow", "on", "k-diffusion, ComfyUI", "diffusers", "web UIs"], solvers),
            GRIDS,
            table(["sdeflow", "elsewhere"], sorted(grids)),
            PRESET,
            table(["name", "on", "solver", "grid", "steps", "evaluations", "source"], presets),
        ]
    )


if __name__ == "__main__":
    FILE.write_text(page())
