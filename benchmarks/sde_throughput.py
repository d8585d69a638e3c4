"""Path-steps per second of forward SDEs: sdeflow beside a hand-written loop, torchsde and diffrax.

    python benchmarks/sde_throughput.py [--quick] [--out benchmarks/results/sde_throughput.md]

Ornstein-Uhlenbeck, geometric Brownian motion and the stochastic Lorenz system by Euler-Maruyama in
float32 on one thread, everybody with the same drift and diffusion, from the start of a call to its
end. The peers take turns, `--rounds` times; figures are of each one's quickest round.

loop: the loop in place that a patient person writes (`normal_`, `add_`, `addcmul_`), with h known
    and the drift and diffusion that the others call.
sdeflow: `integrate(...)` with a seed, set-up and checks included; compiled: with `compile=True`.
torchsde: `sdeint(method="euler")` as it comes, with its BrownianInterval.
diffrax: `diffeqsolve` under `jax.jit`, with UnsafeBrownianPath, the quickest that it has; tree:
    with VirtualBrownianTree.

torchsde and diffrax run in processes of their own; a call that takes longer than `--limit` seconds
is ended and shown as "> limit", and larger cases of that peer are not begun.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import select
import subprocess
import sys
import time
from pathlib import Path

BATCHES, SIZES, STEPS = [1, 64, 4096, 65536], [1, 16, 64], [100, 1000]
PROBLEMS = ["OU", "GBM", "Lorenz"]
PEERS = ["loop", "sdeflow", "compiled", "torchsde", "diffrax", "tree"]
VOLATILITY = 0.3


# ---- here: torch


def problems():
    """The SDEs of sdeflow; g is a number, or a tensor of the shape of x."""
    import torch

    from sdeflow import SDE

    class OU(SDE):
        additive = True
        g = torch.tensor(VOLATILITY)

        def drift(self, x, t):
            return -1.5 * x

        def diffusion(self, x, t):
            return self.g

    class GBM(SDE):
        def drift(self, x, t):
            return 0.1 * x

        def diffusion(self, x, t):
            return VOLATILITY * x

    class Lorenz(SDE):
        additive = True
        g = torch.tensor(VOLATILITY)

        def drift(self, x, t):
            a, b, c = x.unbind(-1)
            return torch.stack((10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c), -1)

        def diffusion(self, x, t):
            return self.g

    return {"OU": OU(), "GBM": GBM(), "Lorenz": Lorenz()}


def loop(process, x, steps):
    """By hand, on the same drift(x, t) and diffusion(x, t), the times made beforehand as tensors;
    what is added is a number times z where g is known to be a number."""
    import torch

    h, root = 1 / steps, math.sqrt(1 / steps)
    x, z = x.clone(), torch.empty_like(x)
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64).unbind(0)
    if process.additive:
        for t in times[:-1]:
            f, _ = process.drift(x, t), process.diffusion(x, t)
            x.add_(f, alpha=h).add_(z.normal_(), alpha=VOLATILITY * root)
    else:
        for t in times[:-1]:
            f, g = process.drift(x, t), process.diffusion(x, t)
            x.add_(f, alpha=h).addcmul_(g, z.normal_(), value=root)
    return x


def torch_peers(name, batch, d, steps):
    """{peer: a call}, for the peers of this process."""
    import torch

    from sdeflow import EulerMaruyama, integrate

    process, x = problems()[name], torch.rand(batch, d) + 0.5
    ts, solver = torch.linspace(0, 1, steps + 1, dtype=torch.float64), EulerMaruyama()
    return {
        "loop": lambda: loop(process, x, steps),
        "sdeflow": lambda: integrate(process, x, ts, solver, seed=0),
        "compiled": lambda: integrate(process, x, ts, solver, seed=0, compile=True),
    }


# ---- in processes of their own: torchsde, diffrax


def torchsde_call(name, batch, d, steps):
    import torch
    import torchsde

    class Problem(torch.nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def f(self, t, x):
            if name == "Lorenz":
                a, b, c = x.unbind(-1)
                return torch.stack((10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c), -1)
            return (-1.5 if name == "OU" else 0.1) * x

        def g(self, t, x):
            return VOLATILITY * x if name == "GBM" else torch.full_like(x, VOLATILITY)

    torch.set_num_threads(1)
    problem, x, ts = Problem(), torch.rand(batch, d) + 0.5, torch.tensor([0.0, 1.0])

    def call():
        with torch.no_grad():
            torchsde.sdeint(problem, x, ts, dt=1 / steps, method="euler")

    return call


def diffrax_call(name, batch, d, steps, tree=False):
    import diffrax
    import jax
    import jax.numpy as jnp
    import lineax

    def drift(t, x, args):
        if name == "Lorenz":
            a, b, c = x[..., 0], x[..., 1], x[..., 2]
            return jnp.stack((10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c), -1)
        return (-1.5 if name == "OU" else 0.1) * x

    def diffusion(t, x, args):
        g = VOLATILITY * x if name == "GBM" else jnp.full_like(x, VOLATILITY)
        return lineax.DiagonalLinearOperator(g)

    @jax.jit
    def run(x, key):
        path = (
            diffrax.VirtualBrownianTree(0.0, 1.0, tol=0.5 / steps, shape=x.shape, key=key)
            if tree
            else diffrax.UnsafeBrownianPath(shape=x.shape, key=key)
        )
        terms = diffrax.MultiTerm(diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, path))
        return diffrax.diffeqsolve(
            terms,
            diffrax.Euler(),
            0.0,
            1.0,
            1 / steps,
            x,
            max_steps=steps + 2,
            adjoint=diffrax.ForwardMode(),
        ).ys

    x, key = jax.random.uniform(jax.random.key(1), (batch, d)) + 0.5, jax.random.key(0)
    return lambda: run(x, key).block_until_ready()


def serve(peer):
    """Answer the requests of the other process, a line each: prepare a case, or time some calls."""
    answers, sys.stdout = sys.stdout, sys.stderr
    call = None
    for line in sys.stdin:
        request = json.loads(line)
        begin = time.perf_counter()
        try:
            if "case" in request:
                make = torchsde_call if peer == "torchsde" else diffrax_call
                call = make(*request["case"], **({"tree": True} if peer == "tree" else {}))
                call()
            else:
                for _ in range(request["calls"]):
                    call()
            answer = {"seconds": time.perf_counter() - begin}
        except (Exception, RecursionError) as error:
            answer = {"error": type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)


class Process:
    """A peer in a process of its own, which is ended when it takes too long."""

    def __init__(self, peer, python, limit):
        self.peer, self.python, self.limit, self.child = peer, python, limit, None
        self.given_up = {}  # by problem and d: the smallest batch * steps that was not done

    def ask(self, request, limit):
        if self.child is None:
            command = [self.python, __file__, "--serve", self.peer, "--no-pin"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            quiet = {"stderr": subprocess.DEVNULL}
            self.child = subprocess.Popen(command, text=True, bufsize=1, **pipes, **quiet)
        try:
            self.child.stdin.write(json.dumps(request) + "\n")
            self.child.stdin.flush()
            ready, _, _ = select.select([self.child.stdout], [], [], limit)
            line = self.child.stdout.readline() if ready else ""
        except BrokenPipeError:
            ready, line = True, ""
        if line:
            return json.loads(line)
        self.child.kill()
        self.child.wait()
        self.child = None
        return {"error": "not there" if ready else "> limit"}

    def prepare(self, case):
        """Seconds of the first call, or why there is none."""
        name, batch, d, steps = case
        if self.given_up.get((name, d), math.inf) <= batch * steps:
            return {"error": "> limit"}
        # The first call of all loads the libraries, and compiles.
        answer = self.ask({"case": case}, self.limit + 60)
        if "seconds" in answer:
            answer = self.ask({"calls": 1}, self.limit)
        if "error" in answer:
            self.given_up[name, d] = batch * steps
        return answer

    def close(self):
        if self.child is not None:
            self.child.stdin.close()
            self.child.wait()


def timed(call, calls=1):
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - begin


def measure(case, peers, processes, rounds):
    """{peer: seconds a call, or why not}, and the seconds that compiling took."""
    calls = {k: v for k, v in torch_peers(*case).items() if k in peers}
    seconds, compiling, run = {}, math.nan, {}
    for peer, call in calls.items():
        try:
            first = timed(call)
        except Exception as error:  # no compiler, say
            seconds[peer] = type(error).__name__
            continue
        once = timed(call)
        compiling = first - once if peer == "compiled" else compiling
        run[peer] = (lambda n, call=call: timed(call, n)), once
    for process in processes:
        answer = process.prepare(case)
        if "error" in answer:
            seconds[process.peer] = answer["error"]
        else:

            def ask(n, process=process):
                return process.ask({"calls": n}, 60 + n * process.limit).get("seconds", math.nan)

            run[process.peer] = ask, answer["seconds"]
    times = {peer: [] for peer in run}
    slowest = max(once for _, once in run.values())
    for _ in range(max(1, min(rounds, int(20 / slowest)))):
        for peer, (call, once) in run.items():
            # In short windows: somebody else may be at work on the machine.
            n = max(1, min(30, int(0.003 / once)))
            times[peer].append(call(n) / n)
    return seconds | {peer: min(times[peer]) for peer in times}, compiling


def cell(value, reference):
    return value if isinstance(value, str) else f"{reference / value:.3g}"


def summary(rows):
    """The goals, and the worst case of each."""

    def worst(peer, other, chosen, best=min):
        ratios = [
            (row[other] / row[peer], case)
            for case, row in rows
            if chosen(case[1]) and all(isinstance(row.get(p), float) for p in (peer, other))
        ]
        if not ratios:
            return "not measured"
        ratio, case = best(ratios)
        return f"{ratio:.3g} ({case[0]}, batch {case[1]}, d {case[2]}, {case[3]} steps)"

    def large(batch):
        return batch >= 64

    return [
        f"- sdeflow / loop, from batch 64: at least {worst('sdeflow', 'loop', large)}",
        f"- compiled / loop, from batch 64: at least {worst('compiled', 'loop', large)}",
        f"- sdeflow / diffrax (tree), from batch 64: at least {worst('sdeflow', 'tree', large)}",
        f"- sdeflow / diffrax, from batch 64: at least {worst('sdeflow', 'diffrax', large)}",
        f"- compiled / diffrax, from batch 64: at least {worst('compiled', 'diffrax', large)}",
        f"- compiled / diffrax, batch 1: at least "
        f"{worst('compiled', 'diffrax', lambda batch: batch == 1)}",
        f"- sdeflow / torchsde: {worst('sdeflow', 'torchsde', bool)} to "
        f"{worst('sdeflow', 'torchsde', bool, max)}",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the table there too")
    parser.add_argument("--quick", action="store_true", help="few cases, few rounds")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--no-pin", action="store_true", help="do not keep to one core")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds a call")
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS)
    parser.add_argument("--problems", nargs="*", default=PROBLEMS, choices=PROBLEMS)
    parser.add_argument("--diffrax-python", default=sys.executable, help="an interpreter with it")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity") and not args.no_pin:  # jax would take all cores
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if args.serve:
        return serve(args.serve)
    import torch

    torch.set_num_threads(1)
    batches, sizes, steps = BATCHES, SIZES, STEPS
    if args.quick:
        batches, sizes, steps = [1, 64, 4096], [1, 16], [100, 1000]
        args.rounds, args.limit = min(args.rounds, 20), min(args.limit, 5.0)
    processes = [
        Process(peer, sys.executable if peer == "torchsde" else args.diffrax_python, args.limit)
        for peer in ("torchsde", "diffrax", "tree")
        if peer in args.peers
    ]
    head = "| SDE | d | batch | steps | loop, 10^6 path-steps/s | " + " | ".join(PEERS[1:])
    lines = [
        f"torch {torch.__version__}, Python {platform.python_version()}, one core, float32. The "
        "loop in millions of path-steps a",
        f"second, the others as ratios to it; best of {args.rounds}; a call may take {args.limit:g}"
        " s. The last column: seconds that compiling took.",
        "",
        f"{head} | warm-up |",
        "|---" * (len(PEERS) + 5) + "|",
    ]
    print(lines[-2])
    rows = []
    for name in args.problems:
        for d, n, batch in itertools.product([3] if name == "Lorenz" else sizes, steps, batches):
            case = (name, batch, d, n)
            row, compiling = measure(case, args.peers, processes, args.rounds)
            rows.append((case, row))
            reference = row["loop"]
            cells = [cell(row.get(peer, ""), reference) for peer in PEERS[1:]]
            speed = f"{batch * n / reference / 1e6:.3g}"
            warm = "" if math.isnan(compiling) else f"{compiling:.1f}"
            lines.append(
                f"| {name} | {d} | {batch} | {n} | {speed} | {' | '.join(cells)} | {warm} |"
            )
            print(lines[-1], flush=True)
    for process in processes:
        process.close()
    lines += ["", *summary(rows)]
    print("\n".join(lines[-8:]))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
