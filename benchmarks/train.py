"""Images a second in training and sampling, beside diffusers and denoising-diffusion-pytorch.

    PYTHONPATH=.venv/peers python benchmarks/train.py --out benchmarks/results/train.md
    PYTHONPATH=.venv/peers python benchmarks/train.py --device cuda --bf16 --compile

`make bench-train` puts the peers there and runs the first of these; where
denoising-diffusion-pytorch is not installed, its rows are missing. What each competitor
does in a step is told in train_peers.py. All get the same images, batch, threads and precision;
they run in turn, a block of steps each, the order rotating; the rates are medians over the blocks
and a ratio is the median of the ratios within a turn, so that a load which comes and goes falls on
all of them. With one CPU thread the clock is the processor time of this process, which other work
on the machine does not count into; with more threads, or CUDA, it is the wall's.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import os
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from train_peers import (
    Case,
    How,
    ddpm_pytorch,
    diffusers,
    has_peer,
    ours,
    own_unet,
    sampling,
    size,
    unet,
)

CASES = {
    "cpu": [
        Case("unet_8", (1, 8, 8), 64),  # the digits, as `sdeflow train` takes them
        Case("unet_32_small", (3, 32, 32), 16),
    ],
    "cuda": [
        Case("unet_32", (3, 32, 32), 128),
        Case("unet_64", (3, 64, 64), 64),
    ],
}
TRAINERS = {
    "sdeflow": ours,
    "diffusers": diffusers,
    "ddpm-pytorch": ddpm_pytorch,
    "ddpm-pytorch, own Unet": partial(ddpm_pytorch, own=True),
}
NFE = 20


def trainers():
    """Those of TRAINERS that are installed."""
    return {k: v for k, v in TRAINERS.items() if has_peer() or not k.startswith("ddpm")}


def timer(how):
    """A clock in seconds, and its name; when it is read, the device has done all it was asked."""
    if how.device == "cuda":

        def wall():
            torch.cuda.synchronize()
            return time.perf_counter()

        return wall, "wall clock"
    if torch.get_num_threads() == 1:
        return time.process_time, "processor time"
    return time.perf_counter, "wall clock"


def in_turn(blocks, rounds, clock):
    """{label: seconds of each round}: every block once a round, each time another one first."""
    seconds = {label: [] for label in blocks}
    labels = list(blocks)
    for k in range(rounds):
        for label in labels[k % len(labels) :] + labels[: k % len(labels)]:
            begin = clock()
            blocks[label]()
            seconds[label].append(clock() - begin)
    return seconds


def built(make, how):
    """(competitor, MiB of the device that it and three of its steps took at their peak)."""
    if how.device != "cuda":
        run = make()
        run(3)
        return run, None
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run = make()
    run(3)
    return run, (torch.cuda.max_memory_allocated() - before) / 2**20


def ratio(seconds, label, other):
    """How many times faster `label` is than `other`: the median of the ratios within a round."""
    pairs = zip(seconds[label], seconds[other], strict=True)
    return statistics.median(b / a for a, b in pairs)


def train_table(case, how, steps, rounds, clock):
    """Lines of Markdown, and the ratio of ours to the fastest peer."""
    cuda, runs, memory = how.device == "cuda", {}, {}
    for label, make in trainers().items():
        runs[label], memory[label] = built(partial(make, case, how), how)
    seconds = in_turn({label: partial(run, steps) for label, run in runs.items()}, rounds, clock)
    parameters = dict.fromkeys(runs, size(unet(case)))
    if "ddpm-pytorch, own Unet" in runs:
        parameters["ddpm-pytorch, own Unet"] = size(own_unet(case))
    lines = [
        "| training | parameters | images/s | sdeflow is faster by |" + " MiB |" * cuda,
        "|---|---|---|---|" + "---|" * cuda,
    ]
    for label, taken in seconds.items():
        rate = case.batch * steps / statistics.median(taken)
        row = f"| {label} | {parameters[label] / 1e6:.3f} M | {rate:.1f} "
        row += f"| {ratio(seconds, 'sdeflow', label):.2f} |"
        lines.append(row + (f" {memory[label]:.0f} |" if cuda else ""))
    best = min(ratio(seconds, "sdeflow", label) for label in runs if label != "sdeflow")
    return lines, best


def sample_table(case, how, rounds, clock):
    """Lines of Markdown, and the smallest ratio of ours to the bare network."""
    calls = sampling(case, how, NFE)
    for call in calls.values():
        call()
    seconds = in_turn(calls, rounds, clock)
    lines = [f"| sampling, {NFE} evaluations | images/s | of the bare network |", "|---|---|---|"]
    shares = {label: ratio(seconds, label, "the bare network") for label in calls}
    for label, taken in seconds.items():
        lines.append(
            f"| {label} | {case.batch / statistics.median(taken):.1f} | {shares[label]:.3f} |"
        )
    return lines, min(share for label, share in shares.items() if label.startswith("sdeflow"))


def machine(how, clock_name):
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ["torch", "diffusers", "lightning-fabric"]
        + ["denoising-diffusion-pytorch"] * has_peer()
    )
    device = torch.cuda.get_device_name() if how.device == "cuda" else f"{cpu()}"
    load, cores = os.getloadavg()[0], os.cpu_count()
    state = "loaded" if load > 1.5 * torch.get_num_threads() else "quiet"
    return (
        f"{device}, {torch.get_num_threads()} thread(s) of {cores} cores, machine {state} (load "
        f"{load:.1f}); {'bf16 autocast' if how.bf16 else 'float32'}; {clock_name}\n{versions}, "
        f"Python {platform.python_version()}"
    )


def cpu():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def main(args):
    torch.set_num_threads(args.threads)
    how = How(args.device, args.compile, args.bf16)
    clock, clock_name = timer(how)
    cases = CASES[args.device][: 1 if args.quick else None]
    rounds, steps = (
        args.rounds or (3 if args.quick else 15),
        args.steps or (10 if args.quick else 20),
    )
    lines = [f"{machine(how, clock_name)}. Medians of {rounds} rounds of {steps} steps."]
    if how.compile:
        lines.append(
            "sdeflow and the bare network are compiled (torch.compile), the peers are not."
        )
    for case in cases:
        lines += ["", f"## {case.network}: UNet2DModel, {case.shape}, batch {case.batch}", ""]
        table, best = train_table(case, how, steps, rounds, clock)
        lines += [*table, "", f"Against the fastest peer: {best:.2f}.", ""]
        table, least = sample_table(case, how, rounds, clock)
        lines += [*table, "", f"Least share of the bare network's rate: {least:.3f}."]
        print("\n".join(lines), flush=True)
        if args.out:
            Path(args.out).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile for ours")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16, for all")
    parser.add_argument("--rounds", type=int, help="15, or 3 with --quick")
    parser.add_argument("--steps", type=int, help="of training in a round: 20, or 10")
    parser.add_argument("--quick", action="store_true", help="the first case alone, and briefly")
    parser.add_argument("--out", help="where to write the tables, as Markdown")
    main(parser.parse_args())
