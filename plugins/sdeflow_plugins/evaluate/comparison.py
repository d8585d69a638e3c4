"""The comparison of samplers on a trained run: measured, printed, written down."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sdeflow.errors import ArgumentError, positive_int

from ..generate.sampler import Sampler
from ..train.run import Run
from .bootstrap import Estimate, check_replicates
from .compare import Cell, Store, compare, plans
from .draw import BATCH, balanced, classes_of, draw
from .evaluation import check_guidance
from .features import fingerprint
from .figures import draw_distances, draw_samples
from .judge import Judge
from .panel import FEWEST, METRICS, Panel
from .report import seed_range, versions
from .verdict import tables, verdicts, write_table


def compare_run(
    run: Run,
    samplers: dict[str, Sampler],
    budgets: list[int],
    n: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    judge: Judge | None = None,
    fixed: Mapping[str, int] | None = None,
    metrics: list[str] | None = None,
    guidance: float = 1.0,
    features: tuple[str, str] = ("auto", ""),
    replicates: int = 100,
) -> list[tuple[Cell, Tensor | None]]:
    """The comparison of a run, its tables and verdict printed, its files written; returns each cell
    and its first samples.

    judge: one that is trained already. The other arguments are those of the command.
    """
    from tqdm.auto import tqdm

    if positive_int("n", n) < FEWEST:
        raise ArgumentError(
            f"n={n} must be at least {FEWEST}: a distance between clouds needs a cloud"
        )
    check_replicates(replicates)
    budgets = sorted({positive_int("budgets", budget) for budget in budgets})
    denoiser, shape = run.denoiser(device)
    classes = classes_of(denoiser)
    check_guidance(classes, [guidance])
    todo = plans(samplers, budgets, fixed)
    if not todo:
        raise ArgumentError(f"budgets={budgets} are below one step of every solver; give more")
    train = run.dataset("train")
    asked = balanced(n, train) if classes else None
    labels = asked if guidance else None  # w = 0 asks for no class
    wanted = _wanted(metrics, labels is not None)
    panel = Panel(
        train,
        run.dataset("test"),
        features[0],
        feature_weights=features[1],
        device=device,
        judge=judge,
        wanted=wanted,
    )
    shown = _shown(panel, wanted, metrics is not None)
    seeds = range(seed, seed + n)
    settings = {
        "weights": fingerprint(denoiser.net),  # type: ignore[arg-type]
        "process": repr((denoiser.sde, denoiser.prediction, denoiser.sigma_data)),
        "seeds": seed_range(seeds),
        "guidance": guidance if classes else None,
        "measured_with": panel.version,
        "metrics": sorted(wanted),
        "replicates": replicates,
        "batch": BATCH,  # solvers that choose their own steps do so for a whole batch
        "versions": {k: v for k, v in versions().items() if k in ("sdeflow", "torch")},
    }

    def drawing(sampler: Sampler, steps: int) -> tuple[Tensor, int]:
        return draw(denoiser, shape, sampler, steps, seeds, asked, guidance, device)

    def measuring(x: Tensor) -> dict[str, Estimate]:
        return panel.measure(x, labels, replicates).metrics

    rows: list[tuple[Cell, Tensor | None]] = []
    store = Store(run.path / "comparison", settings)
    with tqdm(total=len(todo), desc="compare", unit="cell") as bar:
        for cell, x in compare(todo, drawing, measuring, store):
            rows.append((cell, x))
            bar.set_postfix_str(
                f"{cell.sampler}, {cell.evaluations} evaluations".replace("\n", " ")
            )
            bar.update()
    cells = [cell for cell, _ in rows]
    floor = panel.floor(n, replicates).metrics.get(shown[0])
    write_table(cells, shown, run.path / "comparison.csv")
    draw_distances(cells, run.path / "distance.png", shown[0], floor)
    draw_samples(rows, run.path / "comparison.png", shown[0], run.ink)
    print(f"\n{tables(cells, shown)}\n\n{verdicts(cells, shown[0])}")
    if floor is not None:
        print(f"real data: {floor.value:.3g}; {n} samples, seeds {settings['seeds']}")
    return rows


def _wanted(metrics: list[str] | None, conditional: bool) -> list[str]:
    """The metrics to measure."""
    if metrics is None:
        distances = ["frechet_distance", "kernel_distance", "sliced_wasserstein"]
        return [*distances, "accuracy"] if conditional else distances
    if not metrics or any(name not in METRICS for name in metrics):
        raise ArgumentError(f"metrics={metrics} must be some of {', '.join(METRICS)}")
    return metrics


def _shown(panel: Panel, wanted: list[str], asked: bool) -> list[str]:
    """The metrics that apply, the main one first: without features the sliced distance is it."""
    missing = [name for name in wanted if name in panel.left_out]
    if asked and missing:
        raise ArgumentError(f"metrics: {missing[0]} does not apply: {panel.left_out[missing[0]]}")
    found = [name for name in wanted if name not in missing]
    if not asked and panel.features.name == "state":
        found.sort(key=lambda name: name != "sliced_wasserstein")
    return found
