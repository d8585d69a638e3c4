"""Solvers on problems whose score is known exactly: error against evaluations, and the order.

    python examples/gaussian.py --out solvers.png

On the probability flow of a Gaussian mixture a solver misses the exact flow by a distance: its RMS
over 64 starting points. On the reverse SDE it misses the law: the variance of its output for data
N(0, 0.4), which `sdeflow.testing` computes without drawing a sample. Prints both tables and draws
them. Solvers that turn out to be one and the same share a row, and a line. It runs a shortlist;
`benchmarks/nfe_error.py` runs all that are registered, on the best of their grids.
"""

import argparse
import itertools
import math

import matplotlib.pyplot as plt
import torch
from PIL import Image

import sdeflow
from sdeflow.grid import log_snr
from sdeflow.testing import MixtureData, order, weak_errors

BUDGETS = [6, 12, 24, 48, 96, 192]  # evaluations of the score
SDE = sdeflow.VP()
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#8e44ad"
GOLD, PINK, SKY, BROWN, GREY = "#b8860b", "#d6569b", "#4aa8d8", "#7a4b3a", "0.55"

# What to run, and the colour of its curve; those of other libraries are grey.
FLOW = {
    "ddim": BLUE,
    "ipndm_3": PINK,
    "edm_heun": GOLD,
    "dpmpp_2m": ORANGE,
    "dpm_solver_3": GREEN,
    "dpmpp_3m": SKY,
    "deis_tab3": BROWN,
    "unipc_3": PURPLE,
    "unipc_v_3": "black",
    "torchdiffeq_rk4": GREY,
    "torchdiffeq_dopri5": GREY,
}
REVERSE = {
    "ddpm": BLUE,
    "ddim": BLUE,  # at eta = 1 it is DDPM
    "euler_maruyama": PINK,
    "dpmpp_2s": GREEN,
    "dpmpp_2m": ORANGE,
    "dpmpp_3m": SKY,
    "sa_solver": PURPLE,
    "torchsde_srk": GREY,
}


def flow_errors():
    """{solver: [(evaluations, error), ...]} on the probability flow of a mixture in the plane."""
    flow = sdeflow.probability_flow(SDE, MixtureData.five(SDE))
    generator = torch.Generator().manual_seed(0)
    x = SDE.prior(torch.randn(64, 2, dtype=torch.float64, generator=generator))
    reference = sdeflow.TorchDiffEq("dopri8", rtol=1e-12, atol=1e-12)
    exact = sdeflow.integrate(flow, x, log_snr(SDE, 1), reference).x

    curves = {}
    for name in FLOW:
        solver = sdeflow.get("solver", name)
        curves[name] = []
        for k, budget in enumerate(BUDGETS):
            steps = budget
            if math.isnan(solver.evaluations):  # it evaluates as often as a tolerance demands
                solver = sdeflow.get("solver", name, rtol=10 ** -(k + 2), atol=10 ** -(k + 2))
            else:
                steps = budget // solver.evaluations
            run = sdeflow.integrate(flow, x, log_snr(SDE, steps), solver)
            error = (run.x - exact).square().mean().sqrt()
            curves[name].append((run.nfe, float(error)))
    return curves


def variance_errors():
    """{solver: [(evaluations, error), ...]} on the reverse SDE of N(0, 0.4)."""
    curves = {}
    for name in REVERSE:
        solver = sdeflow.get("solver", name)
        steps = [budget // solver.evaluations for budget in BUDGETS]
        errors = weak_errors(solver, SDE, eta=1.0, steps=steps)
        curves[name] = [
            (n * solver.evaluations, abs(e)) for n, e in zip(steps, errors, strict=True)
        ]
    return curves


def merged(curves):
    """[(names, curve), ...], worst first: equal curves in one, sdeflow's own names in front."""
    groups = {}
    for name in sorted(curves, key=lambda name: (name.startswith("torch"), name)):
        curve = tuple((nfe, float(f"{error:.6g}")) for nfe, error in curves[name])
        groups.setdefault(curve, []).append(name)
    return sorted(((names, curve) for curve, names in groups.items()), key=lambda g: -g[1][-1][1])


def report(title, groups):
    print(f"\n{title}\n  order   evaluations and error")
    for names, curve in groups:
        (n, e), (m, f) = curve[-2:]
        slope = f"{order([e, f], [n, m]):.2f}" if m == 2 * n else "-"
        points = "".join(f"{nfe:5d} {error:.0e}" for nfe, error in curve)
        print(f"  {slope:>5} {points}   {' = '.join(names)}")


def draw(panels, out):
    """A log-log panel for each problem; every curve is named at its end."""
    plt.rcParams |= {"font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False}
    figure, axes = plt.subplots(1, len(panels), figsize=(8, 4.5), layout="constrained")
    for ax, (title, subtitle, colours, groups) in zip(axes, panels, strict=True):
        ends = []
        for names, curve in groups:
            curve = [point for point in curve if point[0] <= 1.05 * BUDGETS[-1]]
            hue = colours[names[0]]
            width, layer = (1.0, 2) if hue == GREY else (1.8, 3)
            ax.loglog(
                *zip(*curve, strict=True), "o-", color=hue, lw=width, ms=1.8 * width, zorder=layer
            )
            ends.append([math.log10(curve[-1][1]), "\n= ".join(names), hue, curve[-1]])
        ax.set_title(title, loc="left", fontsize=10, fontweight="bold", pad=20)
        ax.text(0, 1.025, subtitle, transform=ax.transAxes, color="0.35")
        ax.set_xlabel("evaluations of the score")
        ax.set_xticks(BUDGETS, BUDGETS)
        ax.minorticks_off()
        ax.set(xlim=(BUDGETS[0] * 0.93, BUDGETS[-1] * 1.1), ylim=(None, 1))
        ax.grid(axis="y", color="0.93", lw=0.8)
        bottom, top = map(math.log10, ax.get_ylim())
        for y, label, hue, end in spread(ends, gap=0.044 * (top - bottom)):
            leader = {"arrowstyle": "-", "color": "0.8", "lw": 0.6, "shrinkA": 1, "shrinkB": 2}
            ax.annotate(
                label,
                end,
                (1.05, (y - bottom) / (top - bottom)),
                textcoords="axes fraction",
                va="center",
                color="0.42" if hue == GREY else hue,
                arrowprops=leader,
            )
    figure.savefig(out, dpi=200)
    Image.open(out).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(out)  # 290 -> 80 kB


def spread(ends, gap):
    """The labels moved apart to `gap` a line, each as near as can be to the end of its curve."""
    ends = sorted(ends)
    for _ in range(500):
        for lower, upper in itertools.pairwise(ends):
            lines = 1 + (lower[1].count("\n") + upper[1].count("\n")) / 2
            push = max(0.0, gap * lines - (upper[0] - lower[0])) / 2
            lower[0] -= push
            upper[0] += push
    return ends


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="solvers.png", help="where to write the picture, a PNG")
    out = parser.parse_args().out
    flow, law = merged(flow_errors()), merged(variance_errors())
    panels = [
        ("Probability-flow ODE", "RMS error to the exact flow", FLOW, flow),
        ("Reverse SDE", "relative error of the variance, exact", REVERSE, law),
    ]
    for title, subtitle, _, groups in panels:
        report(f"{title}: {subtitle}", groups)
    draw(panels, out)
    print(f"\n{out}")
