"""The command `sdeflow sample`; its signature is the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sdeflow.denoiser import Denoiser
from sdeflow.errors import ArgumentError, positive_int
from sdeflow.plugins import get

from ..data.folder import SUFFIXES
from ..pictures import is_image, save_samples
from ..ranks import Ranks
from ..train.run import Run, pick_device
from .condition import condition, count_classes
from .drawing import Drawing, arrange
from .film import check_film, film_of, save_film
from .sampler import Sampler
from .shards import parse_seeds, sample_seeds

FILMED, POINTS = 100, 1000
"""A film shows so many images at most, or points in the plane; the first ones of each row."""


def sample(
    run: str,
    n: int | None = None,
    class_: int | str | list[int | str] | None = None,
    guidance: float | None = None,
    guidance_interval: list[float] | None = None,
    autoguide: str = "",
    solver: str = "dpmpp_2m",
    solver_options: dict[str, Any] | None = None,
    steps: int = 20,
    eta: float | None = None,
    grid: str = "log_snr",
    grid_options: dict[str, Any] | None = None,
    preset: str = "",
    seed: int = 0,
    seeds: int | list[int] | str | None = None,
    batch: int = 256,
    image: str = "",
    strength: float | None = None,
    interpolate: str = "",
    film: str = "",
    save: Literal["png", "npy", "safetensors"] = "png",
    out: str = "",
    best: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Draw samples from a trained run.

    Writes a picture, and the samples themselves if asked to. Every sample has a seed of its own
    and depends on nothing else of the batch; under torchrun, the processes share the batches among
    them. Examples:

        sdeflow sample runs/digits --solver ddim --steps 50
        sdeflow sample runs/digits --class 3 --guidance 2.0 --solver dpmpp_2m --steps 15
        sdeflow sample runs/digits --class all --guidance 2.0 --guidance_interval '[0.2, 2]'
        sdeflow sample runs/digits --solver torchdiffeq --solver_options.rtol 1e-3
        sdeflow sample runs/digits --preset unipc_10 --film digits.gif
        sdeflow sample runs/digits --image mine.png --strength 0.5
        sdeflow sample runs/digits --interpolate 7,12 --n 8
        sdeflow sample runs/digits --seeds 0-9999 --save npy

    Args:
        run: the run folder.
        n: the number of samples, 64; of each class where there are several, or of each image, 8.
        class_: of a conditional run: one, several such as '[0, 1]', or all; by number or by name.
            Several make the rows of the picture, with the same seeds in each.
        guidance: the weight w of D_null + w (D_class - D_null): 0 leaves the class out, 1 (the
            default) is the class alone, more than 1 goes beyond. Each evaluation is then of a batch
            twice as large.
        guidance_interval: the noise levels sigma/alpha at which the guidance counts, such as
            '[0.2, 2]'; elsewhere the class alone.
        autoguide: the folder of a weaker run, a smaller or shorter one, to guide away from:
            D_weak + w (D - D_weak), with the weight of --guidance.
        solver: by name; `sdeflow list` prints them.
        solver_options: of the solver, such as --solver_options.method rk4.
        steps: of the grid.
        eta: scale of the noise, 0 (the probability flow) to 1 (the reverse SDE); by default 0
            where the solver takes it, else 1.
        grid: by name; `sdeflow list` prints them.
        grid_options: of the grid, such as --grid_options.rho 5.
        preset: solver, eta, grid and steps by one name, instead of them; `sdeflow list` prints
            them.
        seed: with k, the seeds are the n from k n on: another k, other samples.
        seeds: one for each sample, such as 0-9999, 0-9,20 or '[7, 7, 8]', instead of n and seed;
            equal seeds give equal samples.
        batch: samples at a time, as memory allows.
        image: a file, or a folder of them, to begin from: noise is added up to time strength T,
            and taken away again.
        strength: of the change to the image: 0 gives it back, 1 begins from noise; by default 0.6.
        interpolate: two seeds, such as 7,12, or two image files, a.png,b.png: n samples on the way
            from one to the other.
        film: a file for the film of 100 samples, or 1000 points, on their way: .gif, or .mp4 with
            sdeflow[video].
        save: png writes the picture alone, npy and safetensors also the samples, in [-1, 1].
        out: the picture's file; by default samples/SOLVER_STEPS....png in the run folder, named
            after what was asked. A file that is there is replaced.
        best: the checkpoint of the lowest loss instead of the last one.
        device: auto, cpu or cuda.
    """
    named = Sampler(solver, solver_options or {}, eta, grid, grid_options or {})
    sampler, steps = _sampler(named, steps, preset)
    batch, opened, place = positive_int("batch", batch), Run.open(run), _device(device)
    if strength is not None and not image:
        raise ArgumentError(
            f"strength={strength!r} is that of the change to an image: give --image"
        )
    denoiser, shape = opened.denoiser(place, best)
    weak = _weak(autoguide, shape, place)
    chosen = condition(denoiser, opened.class_names, class_, guidance, guidance_interval, weak)
    if film:
        check_film(film, shape)
    if save == "png" and not is_image(shape) and shape != (2,):
        raise ArgumentError(f"samples of shape {shape} have no picture; write them with --save npy")
    several = len(chosen.classes) > 1 or bool(image) or bool(interpolate)
    row = _seeds(n, seed, seeds, several, interpolate)
    base = Drawing(chosen, sampler, steps, shape, place, row)
    drawing = arrange(base, opened.class_names, image, strength, interpolate, opened.ink)
    asked = [preset or f"{solver}_{steps}", *_asked(drawing, autoguide, image, interpolate)]
    path = Path(out) if out else opened.path / "samples" / f"{'_'.join(asked)}.png"
    if path.suffix.lower() not in SUFFIXES:
        raise ArgumentError(f"out={out!r} must be a picture's file, such as samples.png")
    alone = len(drawing.seeds) <= batch

    def draw(seeds: list[int], places: slice) -> Any:
        return drawing.draw(seeds, places, progress=alone)

    job, folder = {"drawing": drawing.fingerprint()}, opened.path / "samples"
    with sample_seeds(draw, drawing.seeds, batch, folder, job, progress=not alone) as samples:
        if samples is None:  # one of several processes, and not the first
            return
        written = _write(samples.x, drawing, path, save, opened.ink)
    if film:
        rows = len(drawing.seeds) // len(row)
        written.append(_film(drawing, rows, batch, film, opened.ink))
    where = " where guidance counts" if chosen.interval else ""
    twice = f", each of twice the batch{where}" if chosen.guided else ""
    files = " and ".join(map(str, written))
    print(f"{len(samples.x)} samples in {samples.nfe} evaluations{twice}: {files}")


def _sampler(sampler: Sampler, steps: int, preset: str) -> tuple[Sampler, int]:
    """The sampler and the steps, of a preset if one is named."""
    if not preset:
        return sampler, steps
    if (sampler, steps) != (Sampler("dpmpp_2m", grid="log_snr"), 20):
        raise ArgumentError(
            f"preset={preset!r} sets the solver, eta, the grid, their options and the steps: "
            "leave them out, or leave out the preset"
        )
    named = get("preset", preset)
    given = dict(named.solver_options), named.eta, named.grid, dict(named.grid_options)
    return Sampler(named.solver, *given), named.steps


def _device(device: str) -> torch.device:
    """The device of that name; each of several processes has a GPU of its own."""
    place, ranks = pick_device(device), Ranks.here()
    if place.type == "cuda" and ranks.world > 1:
        return torch.device("cuda", ranks.local_rank % torch.cuda.device_count())
    return place


def _weak(run: str, shape: tuple[int, ...], place: torch.device) -> Denoiser | None:
    """The denoiser of the run to guide away from."""
    if not run:
        return None
    weak, theirs = Run.open(run).denoiser(place)
    if theirs != shape:
        raise ArgumentError(f"autoguide={run!r} makes samples of shape {theirs}, this run {shape}")
    return weak


def _seeds(
    n: int | None,
    seed: int,
    seeds: int | list[int] | str | None,
    several: bool,
    interpolate: str,
) -> list[int]:
    """The seeds of one row of the picture."""
    if seeds is not None:
        if n is not None or seed or interpolate:
            raise ArgumentError(
                "seeds names every sample: leave out n and seed, and interpolate, which has two "
                "seeds of its own"
            )
        return parse_seeds(seeds)
    count = positive_int("n", (8 if several else 64) if n is None else n)
    return parse_seeds(range(seed * count, (seed + 1) * count))


def _asked(drawing: Drawing, autoguide: str, image: str, interpolate: str) -> list[str]:
    """What a default file name tells beside the sampler."""
    chosen, parts = drawing.condition, []
    if chosen.classes:
        every = len(chosen.classes) > 1 and len(chosen.classes) == count_classes(chosen.denoiser)
        parts += ["class", *(["all"] if every else map(str, chosen.classes))]
    if chosen.w != 1:
        parts.append(f"w{chosen.w:g}")
    if chosen.interval:
        parts += ["in", *(f"{level:g}" for level in chosen.interval)]
    if autoguide:
        parts += ["away_from", Path(autoguide).name]
    if image:
        parts += ["from", Path(image).stem, f"{drawing.strength:g}"]
    if interpolate:
        parts += ["between", *(Path(end.strip()).stem for end in interpolate.split(","))]
    return parts


def _write(x: Tensor, drawing: Drawing, path: Path, save: str, ink: bool) -> list[Path]:
    """The files of the samples: themselves if asked for, and their picture where there is one."""
    written = []
    if save != "png":
        told = {"seeds": torch.tensor(drawing.seeds)} if drawing.ends is None else {}
        told |= {} if drawing.labels is None else {"labels": drawing.labels}
        written.append(save_tensor(x, path.with_suffix(f".{save}"), **told))
    if is_image(x.shape[1:]) or x.shape[1:] == (2,):
        shown, columns = drawing.picture(x)
        names = {"rows": drawing.rows, "tops": drawing.tops}
        written.append(save_samples(shown, path, ink=ink, columns=columns, **names))
    return written


def _film(drawing: Drawing, rows: int, batch: int, file: str, ink: bool) -> Path:
    """The film of the first samples of every row, in as many rows."""
    images = is_image(drawing.shape)
    most = min(FILMED, batch) if images else POINTS
    shown = drawing.first(rows, max(1, most // rows), most)
    run = shown.draw(shown.seeds, slice(0, len(shown.seeds)), keep=True)
    frames = film_of(run, drawing.condition.denoiser.sde)
    columns = len(shown.seeds) // rows if rows > 1 else round(len(shown.seeds) ** 0.5)
    names = () if images else drawing.rows
    return save_film(frames, file, columns=max(1, columns), ink=ink, rows=names)


def save_tensor(x: Tensor, path: Path, **told: Tensor) -> Path:
    """Write samples as .npy, or as .safetensors: "x", and what is told of each beside it."""
    import numpy as np
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, x.numpy())
    else:
        save_file({"x": x.contiguous(), **told}, path)
    return path
