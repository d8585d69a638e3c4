"""Error against evaluations on exact scores: every solver on every grid, and its peers beside it.

    python benchmarks/nfe_error.py --out benchmarks/results/nfe_error.md \\
        --docs docs/choosing.md --figure docs/choosing.png
    python benchmarks/nfe_error.py --quick

Problems (`nfe_problems.py`): 64 normals of a decaying spectrum, five modes in the plane, and 48
clusters of the digits in 64 dimensions; each with the noise of VP (sigma/alpha from 152 to 0.01)
and of EDM (80 to 0.002). ODE solvers are judged by their distance to the exact probability flow
from the same x_T: the root mean square over 256 points, and the median, which the few points that
end in another mode do not rule. SDE solvers are judged by their law: exactly on the spectrum, by
the sliced Wasserstein distance on the mixtures. A run is judged where its grid ends, at t_min or at
0. diffusers' schedulers and the formulas of the official DPM-Solver run on the same levels from the
same x_T in the same process (`nfe_peers.py`), and diffusers' also as they come. Nothing is timed.
"""

from __future__ import annotations

import argparse
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import nfe_figure
import nfe_runs as runs
import nfe_tables as tables
import torch
from nfe_problems import PROBLEMS

from sdeflow import get

LEARNED = [
    ("unipc_v_3", "angle"),
    ("unipc_v_2", "angle"),
    ("ipndm_3", "angle"),
    ("unipc_2", "angle"),
    ("unipc_3", "log_snr"),
    ("dpmpp_2m", "angle"),
    ("dpmpp_2m", "log_snr"),
    ("dpmpp_2m", "karras"),
]


def measure(quick, found):
    """Add the raw figures: {part: {(range, problem, solver, grid, budget): (RMS, median)}}."""
    budgets = [5, 10] if quick else runs.BUDGETS
    grids = ["log_snr", "angle", "karras, to 0"] if quick else list(runs.GRIDS)
    cases = {
        (s, p): runs.Case(sde, build(), 64 if quick else 256)
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
        for what, options in tables.LAST_STEPS.items()
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
        few = [5, 6, 8, 10, 15, 20, 50]
        parts["learned"] = lambda: runs.learned_errors(mixtures, LEARNED, few, [0.05, 0.2])
        parts["amplified"] = lambda: runs.amplified(LEARNED, few)
        parts["guided"] = lambda: runs.guided_errors(LEARNED, few, [3.0, 7.5], 256)
        parts["last"] = lambda: runs.flow_errors(
            cases, ends, some("log_snr", "karras", "quadratic", "arctan", "angle"), budgets[:7]
        )
    for part, make in parts.items():
        if part not in found:
            found[part] = make()
            print(f"{part} done", flush=True)
            yield


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the tables there too")
    parser.add_argument("--figure", type=Path, help="draw the figure there")
    parser.add_argument("--docs", type=Path, help="fill the tables of a page, docs/choosing.md")
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
    text = tables.write(found)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)
    if args.docs:
        args.docs.write_text(tables.fill(args.docs.read_text(), found))
    if args.figure:
        nfe_figure.draw(found, args.figure)


if __name__ == "__main__":
    main()
