"""The command `sdeflow compare`; its signature is the command line."""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sdeflow.errors import ArgumentError, positive_int

from ..data import TensorData
from ..generate.sampler import SAMPLERS, Sampler
from ..pictures import is_image
from ..train.run import Run, pick_device
from .compare import Cell, Distance, flat, table, write_table
from .compare import compare as compare_cells
from .distances import sliced_wasserstein
from .figures import draw_distances, draw_samples
from .judge import Judge, train_judge

FRECHET = "Fréchet distance"


def compare(
    run: str,
    solvers: list[str] | None = None,
    budgets: list[int] | None = None,
    n: int = 500,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Compare solvers on a trained run: evaluations against distance to held-out data.

    Every solver starts from the same noise. Prints the table; writes comparison.csv,
    comparison.png (rows: solvers, columns: evaluations) and distance.png into the run folder. The
    distance is Frechet's in the features of a classifier trained on the real images, where the
    data set has labels; otherwise the sliced Wasserstein distance. Example:

        sdeflow compare runs/digits --solvers '[ddim, heun, dpmpp_2m]' --budgets '[10, 20, 40]'

    Args:
        run: the run folder.
        solvers: by name, each on the probability flow if it can; by default six of all kinds.
        budgets: evaluations of the network for each column; by default 5, 10, 20 and 50.
        n: samples for each cell.
        seed: of the noise, for all cells.
        device: auto, cpu or cuda.
    """
    chosen = SAMPLERS if solvers is None else {name: Sampler(name) for name in solvers}
    compare_run(Run.open(run), chosen, budgets or [5, 10, 20, 50], n, seed, pick_device(device))


def compare_run(
    run: Run,
    samplers: dict[str, Sampler],
    budgets: list[int],
    n: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    yardstick: Yardstick | None = None,
) -> list[tuple[Cell, Tensor | None]]:
    """The comparison of a run, its table printed, its files written; returns cells and samples."""
    from tqdm.auto import tqdm

    if positive_int("n", n) < 2:
        raise ArgumentError("n=1 must be at least 2: a distance between clouds needs a cloud")
    budgets = sorted({positive_int("budgets", budget) for budget in budgets})
    denoiser, shape = run.denoiser(device)
    name, distance, floor = yardstick or distance_to_data(run)
    rows: list[tuple[Cell, Tensor | None]] = []
    with tqdm(total=len(samplers) * len(budgets), desc="compare", unit="cell") as bar:
        for cell, x in compare_cells(
            denoiser, (n, *shape), samplers, budgets, distance, seed, device
        ):
            rows.append((cell, x))
            bar.set_postfix_str(f"{flat(cell.sampler)}, {cell.evaluations} evaluations")
            bar.update()
    cells = [cell for cell, _ in rows]
    if not cells:
        raise ArgumentError(f"budgets={budgets} are below one step of every solver; give more")
    write_table(cells, run.path / "comparison.csv")
    draw_distances(cells, run.path / "distance.png", name, ("real training data", floor))
    draw_samples(rows, run.path / "comparison.png", "distance", run.ink)
    print(f"\n{table(cells, f'{name} of {n} samples to held-out data (real: {floor:.3g})')}")
    return rows


class Yardstick(NamedTuple):
    """A distance of samples to held-out data, its name, and what the training data reach."""

    name: str
    distance: Distance
    real: float


def distance_to_data(run: Run, judge: Judge | None = None) -> Yardstick:
    """The yardstick of a run: Frechet's where its data are labelled images, else Wasserstein's."""
    train_data, test_data = run.dataset("train"), run.dataset("test")
    real, held_out = whole(train_data), whole(test_data)
    if is_image(held_out.shape[1:]) and getattr(train_data, "labels", None) is not None:
        judge = judge or train_judge(train_data)  # type: ignore[arg-type]
        distance: Distance = partial(judge.distance, real=held_out)
        return Yardstick(FRECHET, distance, distance(real))
    distance = partial(sliced_wasserstein, b=held_out)
    return Yardstick("sliced Wasserstein distance", distance, distance(real))


def whole(data: Dataset, most: int = 5000) -> Tensor:
    """The first samples of a data set as one tensor."""
    if isinstance(data, TensorData):
        return data.x[:most]
    return torch.stack([data[k] for k in range(min(most, len(data)))])  # type: ignore[arg-type]
