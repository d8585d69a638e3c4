"""Point clouds in the plane, made on the spot: the usual toys for vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Generator, Tensor

from sdeflow.errors import ArgumentError, positive_int
from sdeflow.plugins import Factory, hookimpl

from . import TensorData, checked_split

Draw = Callable[[int, Generator], tuple[Tensor, Tensor | None]]
"""n points (n, 2), and where they fall into natural classes, the class of each."""


def _moons(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    side = torch.rand(n, generator=generator) < 0.5
    angle = math.pi * torch.rand(n, generator=generator)
    upper = torch.stack((angle.cos() - 0.5, angle.sin() - 0.25), 1)
    return torch.where(side[:, None], upper, -upper) / 1.7, side.long()


def _spirals(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    turn = torch.rand(n, generator=generator).sqrt()
    arm = torch.rand(n, generator=generator) < 0.5
    radius, angle = 0.9 * (arm.float() * 2 - 1) * turn, 3 * math.pi * turn
    return radius[:, None] * torch.stack((angle.cos(), angle.sin()), 1), arm.long()


def _swiss_roll(n: int, generator: Generator) -> tuple[Tensor, None]:
    turn = 1 + 2 * torch.rand(n, generator=generator)
    angle = 1.5 * math.pi * turn
    return 0.3 * turn[:, None] * torch.stack((angle.cos(), angle.sin()), 1), None


def _gaussians(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    which = torch.randint(8, (n,), generator=generator)
    angle = math.pi / 4 * which
    return 0.8 * torch.stack((angle.cos(), angle.sin()), 1), which


def _checkerboard(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    x = torch.rand(n, generator=generator) * 4
    column = x.floor()
    pair = torch.randint(2, (n,), generator=generator)
    y = 2 * pair + column % 2 + torch.rand(n, generator=generator)
    return torch.stack((x, y), 1) / 2.2 - 2 / 2.2, (2 * column.long() + pair)


MOONS, ARMS = ("lower", "upper"), ("first", "second")
AROUND = ("0", "45", "90", "135", "180", "225", "270", "315")
SQUARES = tuple(f"column {c}, {row}" for c in range(4) for row in ("lower", "upper"))

TOYS: dict[str, tuple[Draw, float, tuple[str, ...], str]] = {
    #               draw         jitter classes what it is, the first line of `sdeflow list`
    "moons": (_moons, 0.03, MOONS, "Two interleaved half circles in the plane, (2,)."),
    "spirals": (_spirals, 0.015, ARMS, "Two spiral arms in the plane, (2,)."),
    "swiss_roll": (_swiss_roll, 0.015, (), "A swiss roll seen from its end, (2,)."),
    "gaussians": (_gaussians, 0.04, AROUND, "Eight Gaussians on a circle, (2,)."),
    "checkerboard": (_checkerboard, 0.0, SQUARES, "A checkerboard of 4 x 4 squares, (2,)."),
}


def _toy(name: str) -> Factory:
    draw, jitter, class_names, summary = TOYS[name]
    natural = f"Classes: {', '.join(class_names)}." if class_names else "Unlabelled."

    def build(
        split: str = "train", n: int = 8192, noise: float = jitter, seed: int = 0
    ) -> TensorData:
        test = checked_split(split) == "test"
        if not 0 <= noise < 1:
            raise ArgumentError(f"noise={noise!r} must be in [0, 1)")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ArgumentError(f"seed={seed!r} must be a whole number >= 0")
        generator = Generator().manual_seed(2 * seed + test)
        points, labels = draw(positive_int("n", n), generator)
        jittered = points + noise * torch.randn(points.shape, generator=generator)
        return TensorData(jittered.clamp(-1, 1), labels, class_names)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""{summary}

    {natural}

    Args:
        split: "train" or "test"; the two have streams of their own.
        n: the number of points.
        noise: standard deviation of the Gaussian jitter.
        seed: of the points.
    """
    return build


@hookimpl
def sdeflow_datasets() -> Mapping[str, Factory]:
    return {name: _toy(name) for name in TOYS}
