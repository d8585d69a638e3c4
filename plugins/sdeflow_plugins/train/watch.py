"""What a run shows while it trains: a bar, TensorBoard, pictures of samples from fixed seeds."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdeflow.errors import ArgumentError

from ..generate.sampler import Sampler
from ..pictures import is_image, loss_curve, save_samples
from .loop import Record
from .run import Run
from .state import State

IMAGES, POINTS, STEPS = 64, 2048, 20
"""In a picture of samples, and the steps of their sampler."""
COLUMNS, ROWS = 8, 20
"""Of the picture of a conditional run: seeds across, classes down; further classes are left out."""


class Watch:
    """The bar, TensorBoard and the pictures of one session, of the process that writes files.

    about: what the checkpoints say beside the weights: class_names, ink.
    """

    def __init__(self, run: Run, state: State, about: dict[str, Any], quiet: bool = False) -> None:
        from tqdm.auto import tqdm

        self.run, self.state, self.about = run, state, about
        self.board = None
        if run.recipe.tensorboard:  # what stands there after this step is to be made again
            folder = str(run.path / "tensorboard")
            self.board = board_writer()(folder, purge_step=state.step + 1)
        self.bar = tqdm(
            initial=state.step, total=run.recipe.steps, desc="train", unit="step", disable=quiet
        )
        self.unit = "images" if is_image(state.shape) else "samples"
        self.seen, self.since = state.step, time.monotonic()

    def step(self, rest: float = 0.0) -> None:
        """One step has been made, and files written for `rest` seconds, which the speed omits."""
        self.since += rest
        self.bar.update()

    def log(self, line: Record) -> None:
        """Show a line of metrics.csv, with the speed since the one before."""
        now = time.monotonic()
        rate = (line.step - self.seen) * self.run.recipe.batch_size / max(now - self.since, 1e-9)
        self.seen, self.since = line.step, now
        self.bar.set_postfix_str(
            f"loss={line.loss:.4f}, lr={line.lr:.1e}, {rate:,.0f} {self.unit}/s"
        )
        if self.board:
            values = {"loss": line.loss, "grad_norm": line.grad_norm, "lr": line.lr}
            for name, value in {**values, f"{self.unit}_per_second": rate}.items():
                self.board.add_scalar(name, value, line.step)

    def draw(self, records: list[Record], device: torch.device) -> None:
        """The loss curve, and samples of the averaged weights, always from the same noise."""
        loss_curve(records, self.run.path / "loss.png")
        path = self.run.path / "samples" / f"step_{self.state.step:08d}.png"
        drawn = picture(self.run, self.state, self.about, path, device)
        if drawn and self.board:
            from PIL import Image

            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            self.board.add_image("samples", pixels, self.state.step, dataformats="HWC")

    def close(self) -> None:
        """End the bar and TensorBoard's file."""
        self.bar.close()
        if self.board:
            self.board.close()


def board_writer() -> Any:
    """TensorBoard's writer of files, a class."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ArgumentError(
            f"tensorboard=True needs TensorBoard ({error}); pip install 'sdeflow[tensorboard]', or "
            "leave tensorboard out"
        ) from error
    return SummaryWriter


def picture(
    run: Run, state: State, about: dict[str, Any], path: Path, device: torch.device
) -> bool:
    """Draw samples of the averaged weights; False for states that have no picture.

    Images: a sheet of 64, or with classes a row of each, the columns having the same noise. Points
    in the plane: a cloud, coloured by class.
    """
    shape, classes = state.shape, min(state.classes, ROWS)
    if not is_image(shape) and shape != (2,):
        return False
    sharded = run.recipe.strategy == "fsdp"  # then only a checkpoint has the weights in one place
    network: Any = run.network(device) if sharded else state.ema.module
    each = COLUMNS if is_image(shape) else POINTS // max(1, classes)
    n = each * classes or (IMAGES if is_image(shape) else POINTS)
    seeds = list(range(COLUMNS)) * classes if classes and is_image(shape) else 0
    was = network.training
    network.eval()
    net = network
    if classes:
        net = partial(network, label=torch.arange(classes, device=device).repeat_interleave(each))
    denoiser = run.recipe.make_denoiser(net)
    x = Sampler().run(denoiser, (n, *shape), steps=STEPS, seed=seeds, device=device).x
    network.train(was)
    names = about["class_names"][:classes] or [str(k) for k in range(classes)]
    columns = COLUMNS if classes else 0
    save_samples(x, path, ink=about["ink"], columns=columns, rows=names)
    return True
