"""The command `sdeflow sample`; its signature is the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from sdeflow.errors import ArgumentError, positive_int
from sdeflow.plugins import get

from ..pictures import is_image, save_samples
from ..train.run import Run, pick_device
from .sampler import Sampler


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
        written.append(save_samples(x, path, ink=opened.ink))
    names = " and ".join(map(str, written))
    print(f"{n} samples in {solution.nfe} evaluations: {names}")


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
