"""The figure of `nfe_error.py`: error against evaluations, each solver on its best grid."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import matplotlib.pyplot as plt
from nfe_tables import mean
from PIL import Image

INK, GREY, PALE = "0.15", "0.45", "0.82"
FLOW = {
    "unipc_v_3": "#d55e00",
    "unipc_3": "#8e44ad",
    "dpmpp_3m": "#4aa8d8",
    "dpmpp_2m": "#0072b2",
    "deis_tab3": "#7a4b3a",
    "ipndm_3": "#d6569b",
    "dpm_solver_3": "#009e73",
    "edm_heun": "#b8860b",
    "ddim": INK,
}
LAW = {
    "er_sde_3": "#d55e00",
    "sa_solver": "#8e44ad",
    "dpmpp_3m": "#4aa8d8",
    "dpmpp_2m": "#0072b2",
    "unipc_2": "#009e73",
    "seeds_2": "#d6569b",
    "edm_churn": "#b8860b",
    "ddim": INK,
}
TICKS = [5, 6, 8, 10, 15, 20, 30, 50, 100]


def curves(found):
    """{solver: (grid, [(evaluations, error), ...])}: the mean over problems, on its best grid."""
    cases = {key[:2] for key in found}
    errors = defaultdict(list)
    for (_, _, name, grid, budget), (rms, _) in found.items():
        if math.isfinite(rms) and rms > 0:
            errors[name, grid, budget].append(rms)
    rows = defaultdict(dict)
    for (name, grid, budget), each in errors.items():
        if len(each) == len(cases):
            rows[name, grid][budget] = mean(each)
    chosen = {}
    for name in {name for name, _ in rows}:
        most = max(len(row) for (other, _), row in rows.items() if other == name)
        of = [(g, row) for (other, g), row in rows.items() if other == name and len(row) == most]
        grid, row = min(of, key=lambda one: mean(one[1].values()))
        chosen[name] = grid, sorted(row.items())
    return chosen


def panel(ax, found, colours, title, subtitle, floor, extra=None):
    ends = []
    for name, (grid, curve) in sorted(curves(found).items(), key=lambda item: item[0] in colours):
        hue = colours.get(name)
        style = {"color": PALE, "lw": 0.7, "zorder": 1}
        if hue:
            bold = name in ("unipc_v_3", "er_sde_3")
            style = {"color": hue, "lw": 2.6 if bold else 1.6, "zorder": 4 if bold else 3}
            style |= {"marker": "o", "ms": 3.6 if bold else 2.6}
            ends.append([curve[-1], f"{name} · {grid}", hue, bold])
        ax.loglog(*zip(*curve, strict=True), **style)
    for name, curve in (extra or {}).items():
        ax.loglog(*zip(*curve, strict=True), color=INK, lw=1.3, ls=(0, (4, 2)), zorder=3)
        ends.append([curve[-1], name, INK, False])
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=22)
    ax.text(0, 1.022, subtitle, transform=ax.transAxes, color=GREY, fontsize=8.5)
    ax.set_xlabel("evaluations of the network")
    ax.set_xticks(TICKS, TICKS)
    ax.minorticks_off()
    ax.set(xlim=(4.8, 106), ylim=floor)
    ax.grid(axis="y", color="0.93", lw=0.8, zorder=0)
    low, high = (math.log10(v) for v in floor)
    spots = [[(math.log10(end[1]) - low) / (high - low), end, *rest] for end, *rest in ends]
    for y, end, label, hue, bold in apart(spots, 0.043):
        ax.annotate(
            label,
            end,
            (1.04, y),
            textcoords="axes fraction",
            va="center",
            fontsize=8.5,
            fontweight="bold" if bold else "normal",
            color=hue,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "0.75", "lw": 0.6, "shrinkA": 1, "shrinkB": 2},
        )


def apart(spots, gap):
    """The labels moved apart to `gap`, each as near as can be to the end of its curve."""
    spots = sorted(spots)
    for _ in range(500):
        for lower, upper in itertools.pairwise(spots):
            push = max(0.0, gap - (upper[0] - lower[0])) / 2
            lower[0], upper[0] = lower[0] - push, upper[0] + push
    return spots


def draw(found, out):
    plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 5.6), layout="constrained")
    least = defaultdict(dict)
    for (s, p, _, _, budget), (rms, _) in found["defaults"].items():
        if math.isfinite(rms):
            least[budget][s, p] = min(rms, least[budget].get((s, p), math.inf))
    peers = sorted((budget, mean(each.values())) for budget, each in least.items())
    panel(
        axes[0],
        found["flow"],
        FLOW,
        "Probability-flow ODE",
        "RMS distance to the exact flow, mean over six problems",
        (1e-6, 1),
        {"best of diffusers, as it comes": peers},
    )
    panel(
        axes[1],
        found["law"],
        LAW,
        "Reverse SDE",
        "distance of the law on Gaussian data, exact",
        (3e-6, 1),
    )
    figure.savefig(out, dpi=180)
    Image.open(out).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(out)
