"""Microseconds a step without the network: sdeflow, diffusers, and the hand-written minimum.

    python benchmarks/overhead.py [--out benchmarks/results/overhead.md] [--repeats 9]

All three get the same noise prediction (a constant tensor, so that the network costs nothing), the
same start and the same number of steps, interleaved in one run; figures are medians. The minimum is
the loop that a patient person would write for just this solver: the coefficients precomputed, the
same multiply-adds fused in place. Stochastic solvers add one plain `torch.randn` a step to it.
sdeflow is timed as a user calls it, `integrate(...)`, set-up and checks included; "a step" is the
slope between 20 and 50 steps, which leaves the set-up out, as it is left out for diffusers, whose
scheduler is timed for its steps alone, without `set_timesteps`.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from pathlib import Path

import torch

from sdeflow import VP, Denoiser, get, integrate, probability_flow, reverse, trace
from sdeflow.grid import log_snr

SHAPES = [(1, 3, 32, 32), (16, 3, 64, 64), (1, 4, 128, 128)]
STEPS = [20, 50]


def minimum(tableau, net, x, times, randn):
    """A loop for one-evaluation solvers, with the numbers of the tableau in plain lists."""
    rows = []
    for row in tableau.rows:
        c = dict(row.state)
        answer = 2 if len(c) > 2 + randn else 1
        # What is remembered is y + r f or f + r y, in units of the larger.
        remember = row.memory[0] if row.memory else ((0, 1.0), (1, 0.0))
        before = c.get(1) if answer == 2 else None
        rows.append((c[0], c[answer], before, c.get(answer + 1), remember[0][0], remember[1][1]))
    spare = [torch.empty_like(x), torch.empty_like(x)]
    shape = tuple(x.shape)

    def first_order():
        y = x.clone()
        for k, (a, b, _, c, _, _) in enumerate(rows):
            y.mul_(a).add_(net(y, times[k]), alpha=b)
            if randn:
                y.add_(torch.randn(shape), alpha=c)
        return y

    def second_order():
        y = x.clone()
        for k, (a, b, d, c, largest, r) in enumerate(rows):
            f = net(y, times[k])
            if largest == 0:
                torch.add(y, f, alpha=r, out=spare[k % 2])
            else:
                torch.add(f, y, alpha=r, out=spare[k % 2])
            y.mul_(a).add_(f, alpha=b)
            if d is not None:
                y.add_(spare[(k + 1) % 2], alpha=d)
            if randn:
                y.add_(torch.randn(shape), alpha=c)
        return y

    return second_order if any(row.memory for row in tableau.rows) else first_order


def diffusers_loop(name, steps, x, output):
    """The scheduler's own loop, with a generator for the stochastic one."""
    import diffusers

    options = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    scheduler = {
        "ddim": lambda: diffusers.DDIMScheduler(**options, clip_sample=False),
        "dpmpp_2m": lambda: diffusers.DPMSolverMultistepScheduler(**options),
        "sde_dpmpp_2m": lambda: diffusers.DPMSolverMultistepScheduler(
            **options, algorithm_type="sde-dpmsolver++"
        ),
    }[name]()
    generator = torch.Generator().manual_seed(0)

    def run():
        scheduler.set_timesteps(steps)
        y = x
        begin = time.perf_counter()
        for t in scheduler.timesteps:
            y = scheduler.step(output, t, y, generator=generator, return_dict=False)[0]
        return time.perf_counter() - begin

    return run


def timed(function):
    def run():
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin

    return run


def measure(shape, steps, name, repeats):
    """Medians in microseconds a step: (minimum, sdeflow, diffusers)."""
    sde = VP()
    x, output = torch.randn(shape), torch.randn(shape)

    def net(x, t):
        return output

    denoiser = Denoiser(net, sde, "noise")
    stochastic = name.startswith("sde_")
    process = reverse(sde, denoiser) if stochastic else probability_flow(sde, denoiser)
    solver = get("solver", name.removeprefix("sde_"))
    ts = log_snr(sde, steps)
    tableau = trace(solver, process, ts)
    times = tableau.host_times.float().unsqueeze(1).expand(-1, shape[0]).unbind(0)
    hand = minimum(tableau, net, x, times, stochastic)
    if not stochastic:
        made = integrate(process, x, ts, solver, seed=0).x
        torch.testing.assert_close(hand(), made, rtol=1e-4, atol=1e-4)
    runs = {
        "minimum": timed(hand),
        "sdeflow": timed(lambda: integrate(process, x, ts, solver, seed=0)),
        "diffusers": diffusers_loop(name, steps, x, output),
    }
    inner = max(3, 3_000_000 // (x.numel() * steps))
    seconds = {peer: [] for peer in runs}
    with torch.no_grad():
        for _ in range(repeats + 2):
            for peer, run in runs.items():
                for _ in range(3):  # whoever comes after another finds cold caches
                    run()
                seconds[peer].append(statistics.median(run() for _ in range(inner)))
    return [statistics.median(seconds[peer][2:]) / steps * 1e6 for peer in runs]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the table there too")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import diffusers

    head = "| solver | shape | minimum, us | sdeflow: 20 steps | 50 steps | a step | diffusers |"
    lines = [
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, Python "
        f"{platform.python_version()}, one thread of a CPU, float32; medians of {args.repeats}.",
        "The minimum in microseconds a step at 50 steps; the others as ratios to it: whole calls,",
        "and (a step) the slope between 20 and 50 steps.",
        "",
        head,
        "|---|---|---|---|---|---|---|",
    ]
    print(head)
    for name in ("ddim", "dpmpp_2m", "sde_dpmpp_2m"):
        for shape in SHAPES:
            (low20, ours20, _), (low50, ours50, peer) = (
                measure(shape, steps, name, args.repeats) for steps in STEPS
            )
            slope = (50 * ours50 - 20 * ours20) / (50 * low50 - 20 * low20)
            lines.append(
                f"| {name} | {shape} | {low50:.1f} | {ours20 / low20:.2f} | {ours50 / low50:.2f} | "
                f"{slope:.2f} | {peer / low50:.1f} |"
            )
            print(lines[-1], flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
