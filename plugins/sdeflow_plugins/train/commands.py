"""The commands `sdeflow train`, `sample` and `compare`; their signatures are the command line."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sdeflow.errors import ArgumentError, positive_int
from sdeflow.plugins import get, plugins

from ..data import TensorData
from .compare import (
    SAMPLERS,
    Cell,
    Distance,
    Sampler,
    draw_distances,
    draw_samples,
    flat,
    table,
    write_table,
)
from .compare import compare as compare_cells
from .evaluate import Judge, sliced_wasserstein, train_judge
from .pictures import is_image, save_samples
from .recipe import Recipe
from .run import Run
from .session import train_run

FRECHET = "Fréchet distance"


def train(run: str, resume: bool = False, **recipe: Any) -> None:
    """Train a network by denoising score matching, into a run folder.

    Writes config.yaml, metrics.csv, loss.png, samples/ and checkpoints/ there. The run's
    config.yaml can be given back with --config, and options after it win. Examples:

        sdeflow train runs/digits
        sdeflow train runs/moons --data moons --network mlp --batch_size 256
        sdeflow train runs/cats --data folder --data_options.path ~/cats --data_options.size 32
        sdeflow train runs/digits --config runs/digits/config.yaml --resume true

    Args:
        run: the run folder, such as runs/digits.
        resume: go on from the last checkpoint of the folder.
    """
    train_run(run, Recipe(**recipe), resume)


def sample(
    run: str,
    n: int = 64,
    solver: str = "dpmpp_2m",
    solver_options: dict[str, Any] | None = None,
    steps: int = 20,
    eta: float | None = None,
    grid: str = "log_snr",
    grid_options: dict[str, Any] | None = None,
    seed: int = 0,
    seeds: list[int] | None = None,
    save: Literal["png", "npy", "safetensors"] = "png",
    out: str = "",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    preset: str = "",
) -> None:
    """Draw samples from a trained run.

    Writes a picture, and the samples themselves if asked to. Examples:

        sdeflow sample runs/digits --solver ddim --steps 50
        sdeflow sample runs/digits --solver ddpm --steps 250 --grid trailing
        sdeflow sample runs/digits --solver torchdiffeq --solver_options.rtol 1e-3
        sdeflow sample runs/digits --preset unipc_10
        sdeflow sample runs/digits --seeds '[7, 7, 8]' --save npy

    Args:
        run: the run folder.
        n: the number of samples.
        solver: by name; `sdeflow list` prints them.
        solver_options: of the solver, such as --solver_options.method rk4.
        steps: of the grid.
        eta: scale of the noise, 0 (the probability flow) to 1 (the reverse SDE); by default 0
            where the solver takes it, else 1.
        grid: by name; `sdeflow list` prints them.
        grid_options: of the grid, such as --grid_options.rho 5.
        seed: of the whole batch.
        seeds: one for each sample, instead of n and seed; equal seeds give equal samples.
        save: png writes the picture alone, npy and safetensors also the samples, in [-1, 1].
        out: the picture's file; by default samples/SOLVER_STEPS.png, or samples/PRESET.png, in the
            run folder.
        device: auto, cpu or cuda.
        preset: solver, eta, grid and steps by one name, instead of them; `sdeflow list` prints
            them.
    """
    sampler = Sampler(solver, solver_options or {}, eta, grid, grid_options or {})
    if preset:
        if (sampler, steps) != (Sampler("dpmpp_2m", grid="log_snr"), 20):
            raise ArgumentError(
                f"preset={preset!r} sets the solver, eta, the grid, their options and the steps: "
                "leave them out, or leave out the preset"
            )
        named = get("preset", preset)
        steps = named.steps
        given = dict(named.solver_options), named.eta, named.grid, dict(named.grid_options)
        sampler = Sampler(named.solver, *given)
    opened = Run.open(run)
    n = positive_int("n", n) if seeds is None else len(seeds)
    if not n:
        raise ArgumentError("seeds=[] is empty; give one seed for each sample, such as '[0, 1]'")
    place = pick_device(device)
    denoiser, shape = opened.denoiser(place)
    solution = sampler.run(
        denoiser, (n, *shape), steps, seed if seeds is None else seeds, place, progress=True
    )
    path = Path(out) if out else opened.path / "samples" / f"{preset or f'{solver}_{steps}'}.png"
    written = []
    x = solution.x.cpu()
    if save != "png":
        written.append(save_tensor(x, path.with_suffix(f".{save}")))
    if is_image(shape) or shape == (2,) or save == "png":
        written.append(save_samples(x, path, ink=ink(opened)))
    names = " and ".join(map(str, written))
    print(f"{n} samples in {solution.nfe} evaluations: {names}")


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
    draw_samples(rows, run.path / "comparison.png", "distance", ink(run))
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


def ink(run: Run) -> bool:
    """Whether the run's images are drawn dark on light."""
    return bool(getattr(plugins().find("dataset", run.recipe.data).factory, "ink", False))


def pick_device(device: str) -> torch.device:
    """The device of that name; auto is CUDA where there is one."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("device='cuda': torch sees no CUDA device here; use auto or cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def save_tensor(x: Tensor, path: Path) -> Path:
    """Write samples as .npy or .safetensors (named "x")."""
    import numpy as np
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, x.numpy())
    else:
        save_file({"x": x.contiguous()}, path)
    return path
