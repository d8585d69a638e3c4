"""The tables of `nfe_error.py`."""

from __future__ import annotations

import math
import platform
import re
from collections import defaultdict

import nfe_peers as peers
import torch

DEFAULT = ("unipc_v_3", "angle")  # what docs/choosing.md recommends
LAST_STEPS = {
    "full": {"last": "full"},
    "auto, reach 3": {"reach": 3.0},
    "auto, reach 2": {},
    "auto, reach 1.5": {"reach": 1.5},
    "lower": {"last": "lower"},
}
CHOICE = [
    DEFAULT,
    ("unipc_v_2", "angle"),
    ("ipndm_3", "angle"),
    ("deis_tab3", "quadratic"),
    ("unipc_2", "angle"),
    ("unipc_3", "log_snr"),
    ("dpmpp_2m", "log_snr"),
    ("dpmpp_2m", "karras, to 0"),
    ("edm_heun", "karras, to 0"),
    ("ddim", "angle"),
]
SDE_CHOICE = [
    ("unipc_2", "angle"),
    ("er_sde_3", "karras"),
    ("er_sde_3", "angle"),
    ("dpmpp_2m", "log_snr"),
    ("dpmpp_2m", "karras, to 0"),
    ("sa_solver", "angle"),
    ("ddim", "angle"),
    ("ddpm", "log_snr"),
    ("edm_churn", "karras, to 0"),
]
SHOWN = [5, 6, 8, 10, 15, 20, 50]


def best(found, s, p, budget, keep=lambda name, grid: True):
    """((RMS, median), solver, grid) of the least RMS."""
    rows = [
        (e, name, grid)
        for (s_, p_, name, grid, b), e in found.items()
        if (s_, p_, b) == (s, p, budget) and keep(name, grid) and math.isfinite(e[0])
    ]
    return min(rows, default=None)


def mean(values):
    """The geometric mean."""
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def each_case(found):
    return sorted({key[:2] for key in found}, reverse=True), sorted({key[4] for key in found})


def main_table(found):
    """The default beside the best of ours and of the peers, a row for each problem and budget."""
    lines = [
        "| noise | problem | evaluations | default: RMS, median | best of ours, RMS | "
        "best peer as it comes, RMS | ratio | best peer on any of our grids, RMS | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    flow, ratios = found["flow"], defaultdict(list)
    on_ours = {
        (s, p, peers.called(*peers.SAME[row][2:4]), g, b): theirs
        for (s, p, row, g, b), (_, theirs) in found["same"].items()
    } | found["official"]
    cases, budgets = each_case(flow)
    for s, p in cases:
        for b in budgets:
            ours, median = flow[s, p, *DEFAULT, b]
            (top, _), name, grid = best(flow, s, p, b)
            (own, own_median), peer, _ = best(found["defaults"], s, p, b)
            (any_, any_median), other, g = best(on_ours, s, p, b)
            ratios[b].append((ours / own, median / own_median, ours / any_, median / any_median))
            lines.append(
                f"| {s} | {p} | {b} | {ours:.1e}, {median:.1e} | {top:.1e} {name}, {grid} | "
                f"{own:.1e} {peer} | {ours / own:.2f} | {any_:.1e} {other}; {g} | "
                f"{ours / any_:.2f} |"
            )
    lines += [
        "",
        "The ratio of the default to the best peer, geometric mean over the six and the worst:",
        "",
        "| evaluations | as they come, RMS | median | on any of our grids, RMS | median |",
        "|---|---|---|---|---|",
    ]
    for b in budgets:
        cells = [f"{mean(c):.2f} ({max(c):.2f})" for c in zip(*ratios[b], strict=True)]
        lines.append(f"| {b} | " + " | ".join(cells) + " |")
    return lines


def best_table(found):
    """Solver and grid with the least error by budget, in geometric mean over the problems."""
    cases, budgets = each_case(found)
    lines = [
        "| evaluations | first | second | third | fourth | fifth |",
        "|---|---|---|---|---|---|",
    ]
    for b in budgets:
        scores = []
        for name, grid in sorted({key[2:4] for key in found}):
            errors = [found.get((*case, name, grid, b), (math.nan, 0))[0] for case in cases]
            if all(math.isfinite(e) and e > 0 for e in errors):
                scores.append((mean(errors), name, grid))
        lines.append(
            f"| {b} | "
            + " | ".join(f"{e:.1e} {name}, {grid}" for e, name, grid in sorted(scores)[:5])
            + " |"
        )
    return lines


def same_table(found):
    """Ours over theirs, the same method on the same levels."""
    lines = [
        "| ours | diffusers' | RMS, ours/theirs: all | to 10 | 15 and more |",
        "|---|---|---|---|---|",
    ]
    rows = defaultdict(list)
    for (*_, row, _, b), ((ours, _), (theirs, _)) in found.items():
        if min(ours, theirs) > 1e-5:  # below, their float32 shows
            rows[row].append((b, ours / theirs))
    for row, values in sorted(rows.items()):
        name, options, peer, theirs, _ = peers.SAME[row]
        cells = []
        for keep in (lambda b: True, lambda b: b <= 10, lambda b: b >= 15):
            r = [ratio for b, ratio in values if keep(b)]
            cells.append(f"{mean(r):.3f} ({min(r):.3f} to {max(r):.3f})" if r else "-")
        lines.append(
            f"| {peers.called(name, options)} | {peers.called(peer, theirs)} | "
            + " | ".join(cells)
            + " |"
        )
    return lines


def last_table(found):
    """RMS over that of full order in every step, by the treatment of long steps."""
    lines = [
        "| solver | grid | " + " | ".join(f"{w}: 5-6, 8-10, 15-30" for w in LAST_STEPS) + " |",
        "|---|---|" + "---|" * len(LAST_STEPS),
    ]
    cases, _ = each_case(found)
    for name, grid in sorted({(key[2].split("|")[0], key[3]) for key in found}):
        cells = []
        for what in LAST_STEPS:
            row = [
                mean(
                    found[*c, f"{name}|{what}", grid, b][0] / found[*c, f"{name}|full", grid, b][0]
                    for c in cases
                    for b in bs
                )
                for bs in ((5, 6), (8, 10), (15, 20, 30))
            ]
            cells.append(", ".join(f"{r:.2f}" for r in row))
        if any(cell != "1.00, 1.00, 1.00" for cell in cells):
            lines.append(f"| {name} | {grid} | " + " | ".join(cells) + " |")
    return lines


def variant_table(found, what, median=True):
    """RMS (median) of the solvers of a shortlist for every size of a change to the problems."""
    cases, budgets = each_case(found)
    lines = [
        f"| {what} | solver, grid | " + " | ".join(map(str, budgets)) + " |",
        "|---|---|" + "---|" * len(budgets),
    ]
    for size in sorted({key[3] for key in found}):
        for name in dict.fromkeys(key[2] for key in found):
            cells = []
            for b in budgets:
                rms, middle = (mean(found[*c, name, size, b][k] for c in cases) for k in (0, 1))
                cells.append(f"{rms:.3f} ({middle:.3f})" if median else f"{rms:.2f}")
            lines.append(f"| {size} | {name} | " + " | ".join(cells) + " |")
    return lines


def choice_table(found, choice, median=True):
    """RMS (and median) of a shortlist, geometric mean over the problems."""
    cases, _ = each_case(found)
    lines = [
        "| solver, grid | " + " | ".join(map(str, SHOWN)) + " |",
        "|---|" + "---|" * len(SHOWN),
    ]
    for name, grid in choice:
        cells = []
        for b in SHOWN:
            pairs = [
                found[*case, name, grid, b] for case in cases if (*case, name, grid, b) in found
            ]
            if len(pairs) < len(cases) or not all(math.isfinite(e) for e, _ in pairs):
                cells.append("-")
                continue
            rms, middle = (mean(pair[k] for pair in pairs) for k in (0, 1))
            cells.append(f"{rms:.1e} ({middle:.1e})" if median else f"{rms:.1e}")
        lines.append(f"| `{name}`, {grid} | " + " | ".join(cells) + " |")
    return lines


def peers_row(found):
    """The last line of a choice_table: the best peer as it comes, chosen apart every time."""
    cases, _ = each_case(found)
    cells = []
    for b in SHOWN:
        rms, middle = (mean(best(found, *case, b)[0][k] for case in cases) for k in (0, 1))
        cells.append(f"{rms:.1e} ({middle:.1e})")
    return "| best of diffusers, as it comes | " + " | ".join(cells) + " |"


def hardships(found, budgets=(6, 10, 20)):
    """RMS of a shortlist where D is off, guided, or off anew every time, on one table."""
    kinds = [("learned", 0.05, "network off by 5 %"), ("guided", 3.0, "guidance 3")]
    kinds += [("guided", 7.5, "guidance 7.5"), ("amplified", 1, "unit normals as D")]
    lines = [
        "| solver, grid | " + " | ".join(what for *_, what in kinds) + " |",
        "|---|" + "---|" * len(kinds),
    ]
    for name in dict.fromkeys(key[2] for key in found["guided"]):
        cells = []
        for part, size, _ in kinds:
            cases, _ = each_case(found[part])
            rms = [mean(found[part][*c, name, size, b][0] for c in cases) for b in budgets]
            cells.append(", ".join(f"{e:.2g}" for e in rms))
        solver, grid = name.split(", ")
        lines.append(f"| `{solver}`, {grid} | " + " | ".join(cells) + " |")
    return lines


def fill(page, found):
    """The page with the tables between its markers made anew."""
    made = {
        "flow": [*choice_table(found["flow"], CHOICE), peers_row(found["defaults"])],
        "law": choice_table(found["law"], SDE_CHOICE, median=False),
        "hardships": hardships(found),
    }
    for name, lines in made.items():
        pattern = rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end -->)"
        body = "\n".join(lines)
        page, count = re.subn(
            pattern, lambda m, body=body: f"{m[1]}\n{body}\n\n{m[2]}", page, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"the page must have one place for the table {name!r}, not {count}")
    return page


def write(found):
    import diffusers

    def section(title, text, lines):
        return ["", f"## {title}", "", *text, *([""] if text else []), *lines]

    sliced, floor = found["sliced"]
    floors = ", ".join(f"{s} {p} {f:.3f}" for (s, p), f in floor.items())
    lines = [
        "# Error against evaluations",
        "",
        "Written by `python benchmarks/nfe_error.py`; what is measured is told there. "
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, Python "
        f"{platform.python_version()}; float64 (diffusers' steps: float32).",
        *section(
            "The default and the peers, on the probability flow",
            [
                f"Default: {DEFAULT[0]} on the grid {DEFAULT[1]}. Peers as they come: diffusers' "
                "schedulers on their own times, all the way to sigma = 0. On any of our grids: "
                "every scheduler of the next table, and the official DPM-Solver, on "
                "the best of the grids for it, chosen for each problem and budget apart."
            ],
            main_table(found),
        ),
        *section(
            "The same method on the same grid",
            [
                "Geometric mean of the ratios (least to largest) over problems, budgets and the "
                "grids log_snr, karras, angle, and karras to 0 where the scheduler wants it."
            ],
            same_table(found["same"]),
        ),
        *section(
            "Best on the probability flow",
            ["The least RMS error, geometric mean over the six problems."],
            best_table(found["flow"]),
        ),
        *section(
            "Best on the reverse SDE, Gaussian data",
            ["Exact W2 distance of the law on the spectrum, geometric mean over VP and EDM."],
            best_table(found["law"]),
        ),
        *section(
            "Best on the reverse SDE, mixtures",
            [
                "Sliced W2 distance of 2,048 samples, geometric mean over the four. Between exact "
                f"samples it is: {floors}."
            ],
            best_table(sliced),
        ),
    ]
    if "learned" in found:
        lines += section(
            "With the errors of a network",
            [
                "D off by 5 and 20 per cent, in the units of EDM's network output, by a smooth "
                "random function of state and level: RMS distance (median) to the flow of the "
                "exact score, geometric mean over the mixtures."
            ],
            variant_table(found["learned"], "error"),
        )
    if "amplified" in found:
        lines += section(
            "Errors that are new at every evaluation",
            ["RMS of the output for unit normals as D, new at every evaluation; VP and EDM."],
            variant_table(found["amplified"], "error", median=False),
        )
    if "guided" in found:
        lines += section(
            "With guidance",
            [
                "Classifier-free guidance towards one of the five modes, or 5 of the 48 clusters: "
                "RMS distance (median) to the guided flow, geometric mean over the mixtures."
            ],
            variant_table(found["guided"], "weight"),
        )
    if "last" in found:
        lines += section(
            "Long last steps",
            ["RMS error over that of full order in every step, where there is a difference."],
            last_table(found["last"]),
        )
    return "\n".join(lines) + "\n"
