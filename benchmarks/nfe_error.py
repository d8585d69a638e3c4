"""Error against evaluations on exact scores: every solver on every grid, and its peers beside it.

    python benchmarks/nfe_error.py --out benchmarks/results/nfe_error.md --figure docs/choosing.png
    python benchmarks/nfe_error.py --quick

Problems (`nfe_problems.py`): 64 normals of a decaying spectrum, five modes in the plane, and 48
clusters of the digits in 64 dimensions; each with the noise of VP (sigma/alpha from 152 to 0.01)
and of EDM (80 to 0.002). ODE solvers are judged by their distance to the exact probability flow
from the same x_T: the root mean square over 512 points, and the median, which the few points that
end in another mode do not rule. SDE solvers are judged by their law: exactly on the spectrum, by
the sliced Wasserstein distance on the mixtures. A run is judged where its grid ends, at t_min or at
0. diffusers' schedulers and the formulas of the official DPM-Solver run on the same levels from the
same x_T in the same process (`nfe_peers.py`), and diffusers' also as they come. Nothing is timed.
"""

from __future__ import annotations

import argparse
import math
import pickle
import platform
import warnings
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import nfe_figure
import nfe_peers as peers
import nfe_runs as runs
import torch
from nfe_problems import PROBLEMS

from sdeflow import get

DEFAULT = ("unipc_v_3", "angle")  # what docs/choosing.md recommends
LAST_STEPS = {
    "full": {"last": "full"},
    "auto, reach 3": {"reach": 3.0},
    "auto, reach 2": {},
    "auto, reach 1.5": {"reach": 1.5},
    "lower": {"last": "lower"},
}


LEARNED = [
    ("unipc_v_3", "angle"),
    ("unipc_v_2", "angle"),
    ("ipndm_3", "angle"),
    ("unipc_3", "log_snr"),
    ("dpmpp_2m", "log_snr"),
    ("dpmpp_2m", "karras"),
]


def measure(quick, found):
    """Add the raw figures: {part: {(range, problem, solver, grid, budget): (RMS, median)}}."""
    budgets = [5, 10] if quick else runs.BUDGETS
    grids = ["log_snr", "angle", "karras, to 0"] if quick else list(runs.GRIDS)
    cases = {
        (s, p): runs.Case(sde, build(), 64 if quick else 512)
        for p, build in PROBLEMS.items()
        for s, sde in runs.SDES.items()
    }
    ode, sde = runs.solvers()
    if quick:
        ode = {name: ode[name] for name in ("ddim", "dpmpp_2m", "unipc_3", "unipc_v_3")}
        sde = {name: sde[name] for name in ("ddim", "dpmpp_2m", "er_sde_3")}

    def some(*names):
        return {g: runs.GRIDS[g] for g in names if g in grids}

    same = some("log_snr", "karras", "angle", "karras, to 0")
    ends = {
        f"{name}|{what}": replace(get("solver", name), **options)
        for name in ("unipc_2", "unipc_3", "eab_data_3", "eab_v_3", "deis_tab3")
        for what, options in LAST_STEPS.items()
    }
    mixtures = {key: case for key, case in cases.items() if key[1] != "spectrum"}
    parts = {
        "flow": lambda: runs.flow_errors(cases, ode, some(*grids), budgets),
        "same": lambda: runs.same_errors(cases, same, budgets),
        "official": lambda: runs.official_errors(cases, grids, budgets),
        "defaults": lambda: runs.default_errors(cases, budgets),
        "law": lambda: runs.law_errors(PROBLEMS["spectrum"](), sde, some(*grids), budgets),
        "sliced": lambda: runs.sliced_errors(
            sde,
            some("log_snr", "karras", "arctan", "angle"),
            budgets[::2],
            256 if quick else 2048,
        ),
    }
    if not quick:
        parts["learned"] = lambda: runs.learned_errors(
            mixtures, LEARNED, [5, 6, 8, 10, 15, 20, 50], [0.05, 0.2]
        )
        parts["last"] = lambda: runs.flow_errors(
            cases, ends, some("log_snr", "karras", "quadratic", "arctan", "angle"), budgets[:7]
        )
    for part, make in parts.items():
        if part not in found:
            found[part] = make()
            print(f"{part} done", flush=True)
            yield


# ---- tables


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


def learned_table(found):
    cases, budgets = each_case(found)
    lines = [
        "| error | solver, grid | " + " | ".join(map(str, budgets)) + " |",
        "|---|---|" + "---|" * len(budgets),
    ]
    for size in sorted({key[3] for key in found}):
        for name in dict.fromkeys(key[2] for key in found):
            cells = []
            for b in budgets:
                rms, median = (mean(found[*c, name, size, b][k] for c in cases) for k in (0, 1))
                cells.append(f"{rms:.3f} ({median:.3f})")
            lines.append(f"| {size:.0%} | {name} | " + " | ".join(cells) + " |")
    return lines


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
            learned_table(found["learned"]),
        )
    if "last" in found:
        lines += section(
            "Long last steps",
            ["RMS error over that of full order in every step, where there is a difference."],
            last_table(found["last"]),
        )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the tables there too")
    parser.add_argument("--figure", type=Path, help="draw the figure there")
    parser.add_argument(
        "--cache", type=Path, help="keep the raw figures there, and begin with them"
    )
    parser.add_argument("--quick", action="store_true", help="a few runs, to see that all works")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    kept = args.cache and args.cache.exists()
    found = pickle.loads(args.cache.read_bytes()) if kept else {}  # a file of your own
    for _ in measure(args.quick, found):
        if args.cache:
            args.cache.write_bytes(pickle.dumps(found))
    text = write(found)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)
    if args.figure:
        nfe_figure.draw(found, args.figure)


if __name__ == "__main__":
    main()
