"""`sdeflow demo`: from random weights to digits, six solvers side by side, in a few minutes."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path

from sdeflow.denoiser import Denoiser
from sdeflow.errors import ArgumentError
from sdeflow.sample import sample

from .data.digits import Digits
from .evaluate.comparison import compare_run
from .evaluate.judge import train_judge
from .evaluate.quality import assess
from .generate.film import save_film
from .generate.sampler import SAMPLERS
from .pictures import save_samples
from .train.recipe import Recipe
from .train.session import train_run

RECIPE = Recipe(
    network_options={"channels": [32, 64], "attention": [1], "dropout": 0.1}, steps=2000
)
QUICK = Recipe(network_options={"channels": [8, 16]}, steps=20, batch_size=16, warmup=5)
MADE_BY = "sdeflow-demo"


def demo(run: str = "runs/demo", seed: int = 0, quick: bool = False, threads: int = 0) -> None:
    """Train on handwritten digits from random weights, then sample them with six solvers.

    About four minutes on two CPU cores, nothing to download. Writes into the run folder the
    samples of each solver, the comparison picture (rows: solvers, columns: evaluations), the table
    of evaluations against the distance to held-out real digits, the loss curve and a film of noise
    becoming digits; prints how good the digits are, judged by a classifier of real ones.

    Args:
        run: the run folder; that of an earlier demo is made anew.
        seed: of the weights, the order of the data and the noise.
        quick: a few seconds and no quality: does everything run?
        threads: CPU threads of torch; 0 leaves them as they are.
    """
    begun = time.perf_counter()
    path = _clear(Path(run))
    preset = asdict(QUICK if quick else RECIPE)
    trained = train_run(path, Recipe(**preset | {"seed": seed, "threads": threads}))
    print(f"{trained.recipe.steps} steps in {(time.perf_counter() - begun) / 60:.1f} minutes")
    budgets, n, images = ([4, 8], 20, 40) if quick else ([5, 10, 20, 50], 500, 1000)
    train_data, test_data = Digits("train"), Digits("test")
    judge = train_judge(train_data, epochs=5 if quick else 25)
    rows = compare_run(
        trained,
        SAMPLERS,
        budgets,
        n,
        seed,
        judge=judge,
        metrics=["frechet_distance"],
        replicates=20 if quick else 100,
    )
    for cell, page in rows:
        if cell.budget == budgets[-1] and page is not None:
            name = SAMPLERS[cell.sampler].solver
            save_samples(page, path / "samples" / f"{name}.png", ink=True)
    denoiser, shape = trained.denoiser()
    x = SAMPLERS["DPM++2M"].run(denoiser, (images, *shape), 20, seed).x
    _film(denoiser, shape, 8 if quick else 30, seed, path / "digits.gif")
    quality = assess(judge, x, train_data, test_data)
    (path / "quality.json").write_text(json.dumps(asdict(quality), indent=1), encoding="utf-8")
    print(f"\n{quality}\n")
    print(f"pictures and tables: {path}; {(time.perf_counter() - begun) / 60:.1f} minutes in all")


def _film(denoiser: Denoiser, shape: tuple[int, ...], steps: int, seed: int, path: Path) -> None:
    """Noise becoming digits, step by step, as DDPM draws them."""
    frames = sample(
        SAMPLERS["DDPM"].process(denoiser),
        (24, *shape),
        solver="ddpm",
        steps=steps,
        seed=seed,
        keep=True,
    ).path
    assert frames is not None
    save_film([*frames], path, columns=8, ink=True)


def _clear(path: Path) -> Path:
    """An empty folder for a demo; one that something else made is left alone."""
    mark = path / f".{MADE_BY}"
    if path.exists() and any(path.iterdir()) and not mark.exists():
        raise ArgumentError(
            f"run={str(path)!r} holds files that no demo made; choose another folder with --run"
        )
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    mark.touch()
    return path
