"""Conditional digits: does a classifier of real digits see the class that was asked for?

Trains by conditional_digits.yaml (goes on where it was broken off; about five minutes on two quiet
CPU cores), then measures against held-out digits, all with bootstrap error bars:

    the share of 1,000 samples at 15 evaluations that are of the class asked for, without guidance
    and with; distances at 15 evaluations against those at 200, for the default sampler and others.

    python benchmarks/conditional_digits.py --run runs/classes
"""

import argparse
from pathlib import Path

import torch
from sdeflow_plugins.evaluate.bootstrap import Estimate
from sdeflow_plugins.evaluate.command import evaluate
from sdeflow_plugins.evaluate.comparison import compare_run
from sdeflow_plugins.evaluate.report import number
from sdeflow_plugins.generate.sampler import Sampler
from sdeflow_plugins.train.recipe import Recipe
from sdeflow_plugins.train.session import train_run

HERE = Path(__file__).parent
DISTANCES = ("frechet_distance", "kernel_distance", "sliced_wasserstein")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/classes"))
    parser.add_argument("--steps", type=int, default=15, help="evaluations of a sample")
    parser.add_argument("--many", type=int, default=200, help="evaluations to compare with")
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--train", type=int, default=0, help="training steps; 0: the recipe's")
    options = parser.parse_args()

    recipe = Recipe.load(HERE / "conditional_digits.yaml")
    if options.train:
        recipe = Recipe(**{**vars(recipe), "steps": options.train})
    run = train_run(options.run, recipe, resume="auto")

    weights = [1.0, options.guidance]
    columns = evaluate(str(run.path), f"0-{options.n - 1}", steps=options.steps, guidance=weights)
    print("\ngoals (one standard error beside each figure)")
    for column, least in zip(columns, (0.97, 0.99), strict=True):
        share, goal = column.measured.metrics["accuracy"], f">= {least:.0%}"
        told(
            f"class as asked, {column.name}", number(share), f">= {least:.0%}", share.value >= least
        )

    default = Sampler()
    samplers = {f"{default.solver}/{default.grid}": default}
    for solver, grid in (("dpmpp_2m", "log_snr"), ("unipc_2", "angle"), ("unipc_3", "angle")):
        samplers.setdefault(f"{solver}/{grid}", Sampler(solver, grid=grid))
    rows = compare_run(
        run, samplers, [options.steps, options.many], options.n, metrics=[*DISTANCES]
    )
    cells = {(cell.sampler, cell.budget): cell.metrics for cell, _ in rows}
    print(f"\ndistances at {options.steps} evaluations over those at {options.many}")
    for k, name in enumerate(samplers):
        few, many = cells[name, options.steps], cells[name, options.many]
        for metric in (DISTANCES[0], DISTANCES[2]):  # the kernel distance may be 0: no ratio
            found = ratio(few[metric], many[metric])
            goal = "<= 1.1" if not k else ""
            told(f"{name}, {metric}", number(found), goal, not k and found.value <= 1.1)


def ratio(a, b):
    """a / b of two figures measured on the same draws."""
    replicates = a.replicates / b.replicates
    return Estimate(a.value / b.value, float(torch.std(replicates)), replicates)


def told(what, figure, goal, holds):
    print(f"  {what:<42}{figure:<20}{goal:<10}{('reached' if holds else 'MISSED') if goal else ''}")


if __name__ == "__main__":
    main()
