"""The commands `sdeflow evaluate` and `sdeflow compare`; their signatures are the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from sdeflow.errors import ArgumentError, positive_int

from ..data import checked_labels
from ..generate.sampler import SAMPLERS, Sampler
from ..generate.shards import parse_seeds
from ..ranks import Ranks
from ..train.run import Run, pick_device
from .bootstrap import check_replicates
from .comparison import compare_run
from .draw import classes_of, read_labels, read_samples
from .evaluation import Column, check_guidance, evaluate_run, write_evaluation
from .features import hash_of
from .panel import Panel
from .report import seed_range
from .rows import named_samplers, preset_sampler


def evaluate(
    run: str,
    seeds: str = "0-999",
    solver: str = "",
    solver_options: dict[str, Any] | None = None,
    steps: int = 15,
    eta: float | None = None,
    grid: str = "",
    grid_options: dict[str, Any] | None = None,
    preset: str = "",
    guidance: list[float] | None = None,
    samples: str = "",
    labels: str = "",
    features: str = "auto",
    feature_options: dict[str, Any] | None = None,
    feature_weights: str = "",
    real: int = 5000,
    replicates: int = 200,
    out: str = "",
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> list[Column]:
    """How good are the samples of a trained run? Figures with error bars, beside real data's.

    Frechet and kernel distance (KID), sliced Wasserstein distance, precision, recall, density and
    coverage against held-out data; of a conditional run the share of samples that a classifier
    trained on real data puts in the class they were asked for; and whether samples are copies of
    training data. Writes evaluation.json, a picture of the samples and one of those nearest to
    training data into the run folder. Examples:

        sdeflow evaluate runs/digits --steps 15 --guidance '[1, 2]'
        sdeflow evaluate runs/digits --seeds 0-9999 --solver dpmpp_2m --grid log_snr --steps 20
        sdeflow evaluate runs/digits --samples mine.npy
        sdeflow evaluate runs/cats --features mine.py:inception

    Args:
        run: the run folder.
        seeds: one for each sample, such as 0-999 or 0-9,20; sample k depends on its seed alone.
        solver: by name; `sdeflow list` prints them. By default that of `sdeflow sample`.
        solver_options: of the solver, such as --solver_options.method rk4.
        steps: of the grid.
        eta: scale of the noise, 0 (the probability flow) to 1 (the reverse SDE); by default 0
            where the solver takes it, else 1.
        grid: by name; by default that of `sdeflow sample`.
        grid_options: of the grid, such as --grid_options.rho 5.
        preset: solver, eta, grid and steps by one name, instead of them.
        guidance: of a conditional run, weights w of D_null + w (D_class - D_null), a column of
            figures for each; 1 is no guidance.
        samples: a .npy or .safetensors file of samples to judge, as `sdeflow sample --save` writes
            them, instead of drawing them.
        labels: a .npy file with the classes that those samples were asked to be; a .safetensors
            file of samples may hold its own.
        features: what distances are measured in: auto, judge (a classifier trained on the run's
            labelled images), state (the numbers themselves), or a network of yours,
            module:object or file.py:object.
        feature_options: of a function that makes the network.
        feature_weights: a .safetensors file of weights for the network.
        real: real samples of each split, at most, that distances use.
        replicates: of the bootstrap.
        out: the JSON file; by default evaluation.json in the run folder.
        device: auto, cpu or cuda.
    """
    alone("evaluate")
    opened, place = Run.open(run), pick_device(device)
    check_replicates(replicates)
    path = Path(out) if out else opened.path / "evaluation.json"
    sampler, steps = _sampler(solver, solver_options, steps, eta, grid, grid_options, preset)
    train, test = opened.dataset("train"), opened.dataset("test")
    x, asked = _given(samples, labels, getattr(train, "classes", 0))
    numbers = parse_seeds(seeds)
    if x is None:
        check_guidance(classes_of(opened.denoiser()[0]), guidance or [1.0])
    panel = Panel(train, test, features, feature_options, feature_weights, real, place)
    if x is not None:
        how = {"file": Path(samples).name, "hash": hash_of(x)}
        columns = [Column(Path(samples).stem, x, asked, panel.measure(x, asked, replicates), how)]
    else:
        columns = evaluate_run(
            opened, panel, sampler, steps, numbers, guidance or [1.0], replicates, place, True
        )
        grid_said = sampler.grid if not sampler.grid_options else f"{sampler.grid} with options"
        print(
            f"{opened.path.name}: {len(numbers)} samples, seeds {seed_range(numbers)}, "
            f"{sampler.solver} on {grid_said}, {columns[0].how['evaluations']} evaluations\n"
        )
    print(write_evaluation(opened, panel, columns, path, replicates))
    print(f"\nwritten: {path} and the pictures beside it")
    return columns


def alone(command: str) -> None:
    """Refuse to run in several processes, each of which would do the whole and write its files."""
    if (world := Ranks.here().world) > 1:
        raise ArgumentError(
            f"sdeflow {command} runs in one process, not in {world}: draw samples under torchrun "
            "with `sdeflow sample --save npy`, then judge the file: sdeflow evaluate --samples"
        )


def _sampler(
    solver: str,
    solver_options: Mapping[str, Any] | None,
    steps: int,
    eta: float | None,
    grid: str,
    grid_options: Mapping[str, Any] | None,
    preset: str,
) -> tuple[Sampler, int]:
    """(sampler, steps) as the command line says, the parts or a preset."""
    default = Sampler()
    if preset:
        if solver or solver_options or grid or grid_options or eta is not None or steps != 15:
            raise ArgumentError(
                f"preset={preset!r} sets the solver, eta, the grid, their options and the steps: "
                "leave them out, or leave out the preset"
            )
        return preset_sampler(preset)
    options = dict(solver_options or {})
    sampler = Sampler(
        solver or default.solver, options, eta, grid or default.grid, dict(grid_options or {})
    )
    sampler.make_solver()
    sampler.make_grid()
    return sampler, positive_int("steps", steps)


def _given(samples: str, labels: str, classes: int) -> tuple[Tensor | None, Tensor | None]:
    """(samples, labels) in the files of the command line, if there are any."""
    if not samples:
        if labels:
            raise ArgumentError("labels go with samples: give --samples too, or leave labels out")
        return None, None
    x, asked = read_samples(Path(samples))
    if labels:
        asked = read_labels(Path(labels))
    return x, None if asked is None else checked_labels(asked, len(x), classes)[0]


# ---- compare


def compare(
    run: str,
    solvers: list[str] | None = None,
    budgets: list[int] | None = None,
    n: int = 500,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    metrics: list[str] | None = None,
    guidance: float = 1.0,
    features: str = "auto",
    feature_weights: str = "",
    replicates: int = 100,
) -> None:
    """Compare solvers on a trained run: evaluations against distances to held-out data.

    Every solver starts from the same noise, so that differences are paired: the verdict says who
    is best at each budget, by how much, and who is not told apart from it. Prints the tables;
    writes comparison.csv, comparison.png (rows: solvers, columns: evaluations) and distance.png
    into the run folder. Finished cells are kept in comparison/: a comparison that was broken off
    goes on, and what has not changed is not measured again; remove the folder to begin anew.
    Examples:

        sdeflow compare runs/digits --solvers '[ddim, heun, dpmpp_2m]' --budgets '[10, 20, 40]'
        sdeflow compare runs/digits --solvers '[unipc_2/angle, edm_heun_18]' --budgets '[15, 40]'

    Args:
        run: the run folder.
        solvers: by name, each on the probability flow if it can: a solver, solver/grid, or a preset
            (with its own number of steps); by default six of all kinds.
        budgets: evaluations of the network for each column; by default 5, 10, 20 and 50.
        n: samples for each cell.
        seed: the first of the n seeds, which all cells share.
        device: auto, cpu or cuda.
        metrics: by name; the first is what the verdict is about. By default distances: Frechet's,
            the kernel distance (KID) and sliced Wasserstein; of conditional runs also the accuracy.
        guidance: of a conditional run, the weight w of D_null + w (D_class - D_null).
        features: what distances are measured in, as for `sdeflow evaluate`.
        feature_weights: a .safetensors file of weights for the network.
        replicates: of the bootstrap.
    """
    alone("compare")
    chosen, fixed = (SAMPLERS, {}) if solvers is None else named_samplers(solvers)
    compare_run(
        Run.open(run),
        dict(chosen),
        budgets or [5, 10, 20, 50],
        n,
        seed,
        pick_device(device),
        fixed=fixed,
        metrics=metrics,
        guidance=guidance,
        features=(features, feature_weights),
        replicates=replicates,
    )
