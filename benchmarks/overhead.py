"""Microseconds a step without the network: sdeflow, diffusers, and the hand-written minimum.

    python benchmarks/overhead.py [--out benchmarks/results/overhead.md] [--repeats 9]
    python benchmarks/overhead.py --all [--out benchmarks/results/overhead_all.md]

All three get the same noise prediction (a constant tensor, so that the network costs nothing), the
same start and the same number of steps, interleaved in one run; figures are medians. The minimum is
the loop that a patient person would write for just this solver: the coefficients precomputed, the
same multiply-adds fused in place. Stochastic solvers add one plain `torch.randn` a step to it.
sdeflow is timed as a user calls it, `integrate(...)`, set-up and checks included; "a step" is the
slope between 20 and 50 steps, which leaves the set-up out, as it is left out for diffusers, whose
scheduler is timed for its steps alone, without `set_timesteps`.

--all: every linear solver of the catalogue. Its minimum is its tableau written out as straight-line
Python: a statement for each fused operation (counted in the table), call of the network and
`torch.randn`, without a loop or a check; its factors of states are numbers, as in the other table,
or ("to 0-dim factors") 0-dim tensors, by which torch multiplies a small state twice as fast, as
sdeflow's loop does. The network's answers lie ready, each of them new to the
step that it is for, as a network's are. All are the best of 20 times `repeats` runs. "Trace" is
the time to make the tableau of 20 steps, once.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
import warnings
from pathlib import Path

import torch

from sdeflow import (
    VP,
    Denoiser,
    ReverseSDE,
    StepSolver,
    catalogue,
    get,
    integrate,
    probability_flow,
    reverse,
    trace,
)
from sdeflow.errors import PairingError
from sdeflow.grid import log_snr
from sdeflow.tableau import Evaluation

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


def solvers():
    """(name, eta) of every linear solver of the catalogue, on the flow and with full noise."""
    for name, entry in catalogue("solver").items():
        solver = get("solver", name)
        if entry.distribution != "sdeflow" or not isinstance(solver, StepSolver):
            continue
        for eta in (0.0, 1.0):
            process = ReverseSDE(VP(), Denoiser(lambda x, t: x, VP()), eta)
            try:
                solver.check(process)
            except PairingError:
                continue
            declared = solver.order if eta == 0 else solver.weak_order
            if (declared or solver.stochastic) and trace(
                solver, process, log_snr(VP(), 4)
            ) is not None:
                yield name, eta


def operations(row):
    """Fused operations of a row: state, arguments of the network, memory; and calls, and draws."""
    calls = [op for op in row.operations if isinstance(op, Evaluation)]
    combined = [*(op.terms for op in calls), *row.memory]
    spent = len(row.state) + sum(len(terms) - (terms[0][1] == 1.0) for terms in combined)
    return spent, len(calls), len(row.operations) - len(calls)


def bare(tableau, net, x, number=float):
    """The tableau written out as straight-line Python, a statement for each operation: no loop, no
    check, coefficients and buffers that lie ready. number: what the factors of states are made."""
    given = {"torch": torch, "net": net, "shape": tuple(x.shape), "x": x}
    given["time"] = torch.ones(x.shape[0])
    lines, registers = ["y = x.clone()"], ["y"]

    def combined(terms, into):
        """Statements for c_i register_i + ..., in a buffer or, of the state, in place."""
        (i, c), *rest = terms
        name, scale = registers[i], f"c{len(given)}"
        given[scale] = number(c)
        given.setdefault(into, torch.empty_like(x))
        if into == name:
            lines.append(f"{into}.mul_({scale})" if c != 1 else "pass")
        elif c == 1 and rest:
            (j, b), *rest = rest
            lines.append(f"torch.add({name}, {registers[j]}, alpha={b!r}, out={into})")
        else:
            lines.append(f"torch.mul({name}, {scale}, out={into})")
        lines.extend(f"{into}.add_({registers[j]}, alpha={b!r})" for j, b in rest)

    for k, row in enumerate(tableau.rows):
        for j, op in enumerate(row.operations):
            if isinstance(op, Evaluation):
                if op.terms != ((0, 1.0),):
                    combined(op.terms, f"stage_{j}")
                at = "y" if op.terms == ((0, 1.0),) else f"stage_{j}"
                lines.append(f"r_{k % 8}_{j} = net({at}, time)")
            else:
                lines.append(f"r_{k % 8}_{j} = torch.randn(shape)")
            registers.append(f"r_{k % 8}_{j}")
        kept = []
        for j, terms in enumerate(row.memory):
            if len(terms) == 1 and terms[0][1] == 1.0:
                kept.append(registers[terms[0][0]])
            else:
                combined(terms, f"kept_{k % 8}_{j}")
                kept.append(f"kept_{k % 8}_{j}")
        combined(row.state, "y")
        registers = ["y", *kept]
    body = "\n    ".join([*lines, "return y"])
    names = ", ".join(name for name in given if name != "y")
    exec(f"def make({names}):\n  def run():\n    {body}\n  return run", scope := {})
    given.pop("y", None)
    return scope["make"](**given)


def measure_one(name, eta, shape, repeats):
    """(operations, evaluations, draws) a step, us of the minimum, the ratios, trace in ms."""
    x, answers = torch.randn(shape), []

    def net(x, t):
        return answers.pop()

    def taken(run, calls):
        """The seconds of a run, the answers made before it."""
        answers[:] = torch.randn(calls, *shape).unbind(0)
        answers[:] = [answer.clone() for answer in answers]
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    process = ReverseSDE(VP(), Denoiser(net, VP(), "noise"), eta)
    solver = get("solver", name)
    figures = {}
    for steps in STEPS:
        ts = log_snr(VP(), steps)
        tableau = trace(solver, process, ts)
        runs = {
            "minimum": bare(tableau, net, x),
            "tensors": bare(tableau, net, x, torch.tensor),
            "sdeflow": lambda ts=ts: integrate(process, x, ts, solver, seed=0),
        }
        calls = tableau.evaluations
        best = dict.fromkeys(runs, math.inf)
        for _ in range(20 * repeats):
            for peer, run in runs.items():
                best[peer] = min(best[peer], taken(run, calls))
        figures[steps] = best
    low, least, ours = (figures[STEPS[1]][peer] - figures[STEPS[0]][peer] for peer in runs)
    tracing = []
    for k in range(5):  # times of their own: no tableau is remembered
        begin = time.perf_counter()
        trace(solver, process, log_snr(VP(), STEPS[0], t_max=0.99 - 1e-3 * k))
        tracing.append(time.perf_counter() - begin)
    counts = operations(tableau.rows[len(tableau.rows) // 2])
    microseconds = low / (STEPS[1] - STEPS[0]) * 1e6
    return counts, microseconds, ours / low, ours / least, min(tracing) * 1e3


def all_solvers(repeats, shape=(1, 3, 32, 32)):
    """The table over the catalogue, line by line."""
    yield f"State {shape}; a step is the slope between {STEPS[0]} and {STEPS[1]} steps."
    yield ""
    yield (
        "| solver | eta | evaluations | draws | operations | minimum, us | sdeflow "
        "| to 0-dim factors | trace, ms |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, eta in solvers():
        counts, low, ratio, strict, tracing = measure_one(name, eta, shape, repeats)
        spent, calls, draws = counts
        yield (
            f"| {name} | {eta:g} | {calls} | {draws} | {spent} | {low:.1f} | {ratio:.2f} | "
            f"{strict:.2f} | {tracing:.1f} |"
        )


def report(lines, out):
    """Print the lines as they come, and write them to a file."""
    kept = []
    for line in lines:
        kept.append(line)
        print(line, flush=True)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("\n".join(kept) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the table there too")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--all", action="store_true", help="every linear solver, beside its minimum"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.all:
        with torch.no_grad():
            report(all_solvers(args.repeats), args.out)
        return
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
