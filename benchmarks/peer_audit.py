"""Orders and laws of the samplers of installed peers, measured: one table.

    make audit
    python benchmarks/peer_audit.py [--out benchmarks/results/peer_audit.md] [--only TEXT]

Every sampler gets the same problems with exact denoisers, through `sdeflow.testing.audit`: a
five-component Gaussian mixture in the plane against its exact probability flow (RMS), and a
Gaussian, on which the law of what a sampler returns is read off exactly, noise included. Grids are
uniform in log-SNR from -7 to 6. The jump to sigma = 0 is left out, so that it is the method that is
measured; the settings of each row stand in it.
Peers that are not installed are left out, and named.

k-diffusion and azula are installed without their dependencies (`make audit` does), for those bring
torchvision; of k-diffusion only `sampling.py` is loaded, which needs nothing of it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import platform
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sdeflow.testing import (
    Foreign,
    audit,
    azula_sampler,
    diffusers_scheduler,
    foreign,
    k_diffusion,
    native,
)
from sdeflow.testing.report import Report

STEPS = (20, 40, 80, 160)
THIRDS = (21, 42, 84, 168)
"""For samplers whose steps come in threes."""


class Row(NamedTuple):
    """A sampler, what is claimed for it, and what there is to say."""

    sampler: Foreign
    claimed: float | None = None
    note: str = ""
    steps: tuple[int, ...] = STEPS


START = "first steps of lower order"
HALF = "the term in D2 is half of the Taylor term; doubled, {} is measured"


def _diffusers() -> Iterator[Row]:
    d = importlib.import_module("diffusers")
    d.utils.logging.set_verbosity_error()

    def row(name: str, claimed: float | None, note: str = "", **options: Any) -> Row:
        steps, refine = options.pop("steps", STEPS), options.pop("refine", 1)
        scheduler = getattr(d, name)(**options)
        label = name.removesuffix("Scheduler") + "".join(
            f", {k}={getattr(v, '__name__', v)}" for k, v in options.items() if k != "clip_sample"
        )
        return Row(diffusers_scheduler(scheduler, refine=refine, name=label), claimed, note, steps)

    def always(t: Any) -> float:
        return 1.0

    def never(t: Any) -> float:
        return 0.0

    multi, single = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
    low = {"lower_order_final": True}  # the last, lower step is the one that is left out
    full = {"lower_order_final": False}
    ode = {"final_sigmas_type": "sigma_min"}
    yield row("DDIMScheduler", 1, clip_sample=False)
    yield row("DDIMParallelScheduler", 1, clip_sample=False)
    yield row("DDPMScheduler", 1, clip_sample=False)
    yield row("DDPMScheduler", 1, clip_sample=False, variance_type="fixed_large")
    yield row("EulerDiscreteScheduler", 1)
    yield row("EulerAncestralDiscreteScheduler", 1)
    yield row("HeunDiscreteScheduler", 2)
    yield row("KDPM2DiscreteScheduler", 2)
    yield row("KDPM2AncestralDiscreteScheduler", 2)
    yield row("LMSDiscreteScheduler", 4, START)
    pndm = "the paper proves order 2"
    yield row("PNDMScheduler", 2, pndm, refine=2)
    yield row("PNDMScheduler", 2, pndm, skip_prk_steps=True)
    yield row("IPNDMScheduler", 4, "the Adams-Bashforth weights of equal steps on unequal ones")
    for order in (2, 3):
        yield row(multi, order, "" if order < 3 else HALF.format(2.8), solver_order=order)
        yield row(
            multi, order, "" if order < 3 else HALF.format(3.3), solver_order=order,
            algorithm_type="dpmsolver", **ode,
        )  # fmt: skip
    yield row(multi, 2, solver_order=2, solver_type="heun")
    yield row(multi, 2, solver_order=2, algorithm_type="sde-dpmsolver++")
    yield row(multi, 2, solver_order=2, algorithm_type="sde-dpmsolver++", solver_type="heun")
    yield row(
        multi, 3, "the term in D2 ends in -1/2; with +1/2, 2.0 is measured", solver_order=3,
        algorithm_type="sde-dpmsolver++",
    )  # fmt: skip
    yield row(multi, 2, solver_order=2, algorithm_type="sde-dpmsolver", **ode)
    for order, steps in ((2, STEPS), (3, THIRDS)):
        yield row(single, order, solver_order=order, steps=steps, **low)
        yield row(
            single, order, solver_order=order, steps=steps, algorithm_type="dpmsolver", **ode, **low
        )
        yield row(
            single, order, "the stages of a step have independent noise", solver_order=order,
            steps=steps, algorithm_type="sde-dpmsolver++", **low,
        )  # fmt: skip
    yield row("DPMSolverSDEScheduler", 2, "Brownian tree")
    for order in (1, 2, 3):
        yield row(
            "DEISMultistepScheduler", order, "" if order < 3 else START, solver_order=order, **full
        )
    for order in (1, 2, 3):
        yield row("UniPCMultistepScheduler", order, solver_order=order, **full)
    yield row("UniPCMultistepScheduler", 3, "lower order at the end", solver_order=3, **low)
    yield row("UniPCMultistepScheduler", 2, solver_order=2, solver_type="bh1", **full)
    sa = {"predictor_order": 3, "corrector_order": 4, "lower_order_final": False}
    yield row("SASolverScheduler", 3, START, tau_func=never, **sa)
    yield row("SASolverScheduler", 3, tau_func=always, **sa)
    yield row("EDMEulerScheduler", 1)
    yield row("EDMDPMSolverMultistepScheduler", 2, solver_order=2)
    yield row("EDMDPMSolverMultistepScheduler", 3, HALF.format(2.8), solver_order=3)
    yield row("EDMDPMSolverMultistepScheduler", 2, solver_order=2, algorithm_type="sde-dpmsolver++")
    yield row("CosineDPMSolverMultistepScheduler", 2, "Brownian tree", solver_order=2)
    yield row("FlowMatchEulerDiscreteScheduler", 1)
    yield row("FlowMatchHeunDiscreteScheduler", 2)
    yield Row(_score_sde_ve(d), None, "predictor and one corrector; norms are means over the batch")


def _score_sde_ve(d: Any) -> Foreign:
    """The loop of ScoreSdeVePipeline; its noise levels are those of the grid, from below."""

    def run(denoise: Any, x: torch.Tensor, ts: torch.Tensor) -> torch.Tensor:
        n = len(ts)
        ends = {"sigma_min": float(ts[-1]), "sigma_max": float(ts[0])}
        scheduler = d.ScoreSdeVeScheduler(num_train_timesteps=n, **ends)
        scheduler.set_timesteps(n)
        scheduler.set_sigmas(n)

        def score(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
            return (denoise(x, s) - x) / s**2

        for i, t in enumerate(scheduler.timesteps[:-1]):  # the last one goes to sigma = 0
            x = scheduler.step_correct(score(x, ts[i]), x).prev_sample
            x = scheduler.step_pred(score(x, ts[i]), t, x).prev_sample
        return x

    return foreign(run, name="ScoreSdeVe")


def _k_diffusion() -> Iterator[Row]:
    s = _k_diffusion_sampling()
    yield Row(k_diffusion(s.sample_euler), 1)
    yield Row(k_diffusion(s.sample_euler, s_churn=10.0), 1)
    yield Row(k_diffusion(s.sample_euler_ancestral), 1)
    yield Row(k_diffusion(s.sample_heun), 2)
    yield Row(k_diffusion(s.sample_heun, s_churn=10.0), 2)
    yield Row(k_diffusion(s.sample_dpm_2), 2)
    yield Row(k_diffusion(s.sample_dpm_2_ancestral), 2)
    yield Row(k_diffusion(s.sample_lms), 4, START)
    fast = "n evaluations, not steps; the last two steps are of order 2 and 1"
    yield Row(k_diffusion(s.sample_dpm_fast), None, fast, THIRDS)
    yield Row(k_diffusion(s.sample_dpm_fast, eta=1.0), None, fast, THIRDS)
    adaptive = "chooses its steps; one error norm for the batch"
    yield Row(k_diffusion(s.sample_dpm_adaptive, rtol=1e-3, atol=1e-4), None, adaptive)
    yield Row(k_diffusion(s.sample_dpmpp_2s_ancestral), 2)
    yield Row(k_diffusion(s.sample_dpmpp_2s_ancestral, eta=0.0), 2)
    yield Row(k_diffusion(s.sample_dpmpp_sde), None, "Brownian tree")
    yield Row(k_diffusion(s.sample_dpmpp_2m), 2)
    yield Row(k_diffusion(s.sample_dpmpp_2m_sde), 2, "Brownian tree")
    yield Row(k_diffusion(s.sample_dpmpp_2m_sde, solver_type="heun"), 2, "Brownian tree")
    yield Row(k_diffusion(s.sample_dpmpp_2m_sde, eta=0.0), 2)
    yield Row(k_diffusion(s.sample_dpmpp_3m_sde), 3, "Brownian tree")
    yield Row(k_diffusion(s.sample_dpmpp_3m_sde, eta=0.0), 3, HALF.format(2.8))


def _k_diffusion_sampling() -> Any:
    """k_diffusion/sampling.py alone: of its package it uses one function, append_dims."""
    found = importlib.util.find_spec("k_diffusion")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("k_diffusion")
    package, utils = types.ModuleType("k_diffusion"), types.ModuleType("k_diffusion.utils")
    package.__path__ = list(found.submodule_search_locations)

    def append_dims(x: torch.Tensor, dims: int) -> torch.Tensor:
        return x.reshape(*x.shape, *[1] * (dims - x.ndim))

    utils.append_dims = append_dims  # type: ignore[attr-defined]
    package.utils = utils  # type: ignore[attr-defined]
    sys.modules |= {"k_diffusion": package, "k_diffusion.utils": utils}
    return importlib.import_module("k_diffusion.sampling")


def _azula() -> Iterator[Row]:
    a = importlib.import_module("azula.sample")
    yield Row(azula_sampler(a.DDPMSampler), None)
    yield Row(azula_sampler(a.DDIMSampler), None)
    yield Row(azula_sampler(a.DDIMSampler, eta=1.0), None)
    yield Row(azula_sampler(a.EulerSampler), 1)
    yield Row(azula_sampler(a.HeunSampler), 2)
    yield Row(azula_sampler(a.ItoSampler), None)
    for kind in (a.zABSampler, a.vABSampler, a.zEABSampler, a.xEABSampler):
        for order in (2, 3):
            yield Row(azula_sampler(kind, order=order), order, START if order > 2 else "")
    scale = "the scale of the integral has sigma_t; with sigma_s, {} is measured"
    yield Row(azula_sampler(a.REABSampler, order=2), 2, scale.format(2.0))
    yield Row(azula_sampler(a.REABSampler, order=3), 3, scale.format(2.95))
    yield Row(azula_sampler(a.PCSampler), None)


def _sdeflow() -> Iterator[Row]:
    for name, claimed in {
        "ddim": 1, "heun": 2, "dpm_solver_2": 2, "dpm_solver_3": 3, "dpmpp_2s": 2, "dpmpp_3s": 3,
        "dpmpp_2m": 2, "dpmpp_3m": 3, "deis_tab3": 3, "unipc_2": 2, "unipc_3": 3, "res_2s": 2,
        "er_sde_3": 3, "ipndm_4": 2, "lms": 4,
    }.items():  # fmt: skip
        yield Row(native(name), claimed, START if name in ("lms", "dpmpp_3m") else "")
    for name, claimed in {
        "ddpm": 1, "ddim": 1, "dpmpp_2m": 2, "dpmpp_3m": 2, "sa_solver": 2, "er_sde_3": 2,
        "seeds_2": 2, "euler_maruyama": 1,
    }.items():  # fmt: skip
        yield Row(native(name, 1.0), claimed)


PEERS: dict[str, tuple[str, Callable[[], Iterator[Row]]]] = {
    # heading      distribution  rows
    "diffusers": ("diffusers", _diffusers),
    "k-diffusion": ("k-diffusion", _k_diffusion),
    "azula": ("azula", _azula),
    "sdeflow": ("sdeflow", _sdeflow),
}


def _number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def _cells(peer: str, row: Row, report: Report) -> list[str]:
    f, point = report.figures, report.figures.get("one point")
    notes = [row.note] if row.note else []
    if f.get("affine") is False:
        found = next(c.detail for c in report.checks if c.name == "law, sampled")
        notes.append("not affine on Gaussian data; sampled: " + found.split("; ")[0])
    if f.get("batch", 0) > 1e-4:
        notes.append(f"samples change by {f['batch']:.0e} with their batch mates")
    if f.get("at sigma 0") == "not finite":
        notes.append("sigma = 0 gives NaN")
    if f.get("non-finite") == "endless":
        notes.append("does not return where the denoiser returns NaN")
    if f.get("non-finite") == "raised" and peer != "sdeflow":
        notes.append("raises where the denoiser returns NaN")
    if f.get("non-finite") == "hidden":
        notes.append("finite samples where the denoiser returns NaN")
    known = {"order", "weak order", "law, sampled", "batch", "sigma = 0", "non-finite"}
    notes += [f"{c.name}: {c.detail}" for c in report.failures if c.name not in known]
    return [
        row.sampler.name,
        _number(row.claimed, "g"),
        _number(f["order"]),
        _number(f["weak order"]),
        _number(f["variance error"], "+.1e"),
        _number(f.get("evaluations"), "g"),
        "" if point is None else "exact" if point < 1e-4 else f"{point:.0e}",
        f.get("precision", ""),
        "; ".join(notes),
    ]


def main() -> None:
    """Measure what is installed; print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    sections, missing, versions = [], [], [f"Python {platform.python_version()}"]
    versions.append(f"torch {version('torch')}")
    for peer, (distribution, rows) in PEERS.items():
        try:
            made = [row for row in rows() if options.only in row.sampler.name]
            versions.append(f"{peer} {version(distribution)}")
        except (ModuleNotFoundError, PackageNotFoundError) as error:
            missing.append(f"{peer} ({error})")
            continue
        lines = []
        for row in made:
            begun = time.perf_counter()
            report = audit(row.sampler, row.claimed, steps=row.steps)
            cells = _cells(peer, row, report)
            print(f"{peer}: {' | '.join(cells)} [{time.perf_counter() - begun:.1f} s]", flush=True)
            lines.append("| " + " | ".join(cells) + " |")
        if lines:
            sections.append(f"## {peer}\n\n{HEAD}\n" + "\n".join(lines))
    text = INTRODUCTION.format(
        versions=", ".join(versions), missing=", ".join(missing) or "none"
    ) + "\n\n".join(sections)
    if options.out:
        options.out.write_text(text + "\n")


HEAD = (
    "| sampler | claimed | RMS order | weak order | variance error | evaluations | one point | "
    "computed in | notes |\n|---|---|---|---|---|---|---|---|---|"
)
INTRODUCTION = """# Peer audit

{versions}. Not installed here: {missing}. To reproduce: `make audit`.

Orders are slopes between 80 and 160 steps (84 and 168 where steps come in threes), or the finest
two whose error is above rounding, on grids uniform in log-SNR from -7 to 6.

- claimed: the order in the sampler's name, argument or documentation; for a sampler that adds noise
  it is compared with the weak order, for the others with the RMS order.
- RMS order: of deterministic samplers, on a five-component Gaussian mixture in the plane, against
  the exact probability flow.
- weak order: of the law on Gaussians of variance 0.02, 0.16, 1 and 6, off centre, exactly (a run on
  unit vectors of x_T and of every noise): the RMS of the errors of means and variances.
  That of multistep methods with noise ends at 2, whatever their polynomials.
- variance error: the relative one on N(0.5, 0.4^2), at the finest grid.
- evaluations: of the denoiser, for one step of the grid. Singlestep schedulers of diffusers count
  each evaluation as a step, and so does this table.
- one point: data that is a single point, 18 steps: the larger relative error of mean and variance;
  exact where it is below 1e-4.
- computed in: the precision of a run whose state is float64.
- sigma = 0: a grid of the same levels with sigma = 0 after them. (azula's own schedules end above
  it.)
- Where the denoiser returns NaN, all samplers return NaN without an error, unless a note says
  otherwise; sdeflow raises.

How diffusers' schedulers were set: `trained_betas` is a table of exactly the grid's noise levels,
in float64, so that no table limits an order; clipping off; the loop of the pipelines, up to and
without the scheduler's last step, the jump to sigma = 0; `timestep_spacing="trailing"` where there
is one. What else differs from the defaults is in the row. Not covered: distilled samplers (LCM,
TCD, consistency models), inverse and inpainting schedulers, video variants of the ones listed.

"""


if __name__ == "__main__":
    main()
