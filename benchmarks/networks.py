"""Samples/s of the network presets, forward and backward: python benchmarks/networks.py [name ...]

On a CPU: float32 on one thread, the small presets, by the clock of the process, which stands still
while others have the core. On a GPU: bf16 autocast, channels_last and torch.compile, all presets,
by the clock on the wall. A figure is the median of `--rounds` rounds, in which the presets take
turns, with the slowest and the quickest beside it. It goes into `NETWORK_PRESETS`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time

import torch
from sdeflow_plugins.networks.presets import NETWORK_PRESETS

SMALL = [n for n, p in NETWORK_PRESETS.items() if p.parameters < 3e7 and n != "unet_1d_16k"]


def round_of(name, device, seconds):
    """Samples/s of one preset, over at least `seconds` after two calls to warm up."""
    preset, gpu = NETWORK_PRESETS[name], device == "cuda"
    torch.manual_seed(0)
    net = preset.network(preset.shape, **preset.options).to(device).train()
    x = torch.randn(preset.batch, *preset.shape, device=device)
    t = torch.rand(preset.batch, device=device)
    if x.ndim == 4:
        net, x = (z.to(memory_format=torch.channels_last) for z in (net, x))
    run = torch.compile(net) if gpu else net
    bf16 = torch.autocast("cuda", torch.bfloat16) if gpu else contextlib.nullcontext()

    def step():
        net.zero_grad(set_to_none=True)
        with bf16:
            loss = run(x, t).square().mean()
        loss.backward()

    def clock():
        if not gpu:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    for _ in range(2):
        step()
    begin, n = clock(), 0
    while n < 3 or clock() - begin < seconds:
        for _ in range(10 if gpu else 1):
            step()
            n += 1
    return n * preset.batch / (clock() - begin)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="presets; all that the device can run if none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a round of a preset")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = options.names or (list(NETWORK_PRESETS) if device == "cuda" else SMALL)
    rates = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            rates[name].append(round_of(name, device, options.seconds))
    print(f"{device}, torch {torch.__version__}, {options.rounds} rounds", end="")
    print(f", load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"{'preset':15s}{'batch':>6s}{'median':>10s}{'slowest':>10s}{'quickest':>10s}")
    for name, found in rates.items():
        figures = (statistics.median(found), min(found), max(found))
        print(f"{name:15s}{NETWORK_PRESETS[name].batch:6d}", *(f"{f:9.1f}" for f in figures))


if __name__ == "__main__":
    main()
