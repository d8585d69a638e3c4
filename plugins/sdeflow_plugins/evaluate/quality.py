"""What the judge says of generated images, beside what it says of real ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import TensorData
from .distances import gaussian_like
from .judge import SURE, Judge


@dataclass(frozen=True)
class Quality:
    """What the judge says of generated images, beside what it says of real ones."""

    images: int
    accuracy: float
    """Of the judge, on held-out real images."""
    sure: float
    """Share of the generated images with a class of probability above 0.8."""
    sure_real: float
    rarest: float
    """Share of the rarest class among the generated."""
    distance: float
    """Frechet, generated to held-out."""
    distance_real: float
    """Frechet, real training images to held-out: what a perfect model would reach."""
    distance_gaussian: float
    """Frechet, Gaussian with the mean and full covariance of the pixels to held-out."""

    def checks(self) -> list[tuple[str, str, bool]]:
        """(what, measured against demanded, whether it holds)."""
        ratio, gauss = self.distance / self.distance_real, self.distance / self.distance_gaussian
        return [
            ("judge right on held-out", f"{self.accuracy:.1%} (>= 98 %)", self.accuracy >= 0.98),
            (
                "judge sure (p > 0.8)",
                f"{self.sure:.1%} (>= 90 %; held-out real ones {self.sure_real:.1%})",
                self.sure >= 0.9,
            ),
            ("share of the rarest class", f"{self.rarest:.1%} (>= 4 %)", self.rarest >= 0.04),
            (
                "Frechet distance",
                f"{self.distance:.2f}: {ratio:.2f} x that of real training images, "
                f"{self.distance_real:.2f} (<= 2.5 x)",
                ratio <= 2.5,
            ),
            (
                "",
                f"{gauss:.1%} of that of a Gaussian, {self.distance_gaussian:.2f} (< 50 %)",
                gauss < 0.5,
            ),
        ]

    @property
    def passed(self) -> bool:
        """Whether all checks hold."""
        return all(holds for *_, holds in self.checks())

    def __str__(self) -> str:
        lines = [f"{self.images} generated images, judged by a classifier of real ones:"]
        for what, measured, holds in self.checks():
            lines.append(f"  {what:<26}{measured}{'' if holds else '   <- missed'}")
        return "\n".join(lines)


def assess(judge: Judge, x: Tensor, train: TensorData, test: TensorData) -> Quality:
    """The quality of generated images x, against the real ones of both splits."""
    p = judge.probabilities(x)
    counts = torch.bincount(p.argmax(1), minlength=p.shape[1])
    return Quality(
        images=len(x),
        accuracy=judge.accuracy(test),
        sure=float((p.amax(1) > SURE).float().mean()),
        sure_real=float((judge.probabilities(test.x).amax(1) > SURE).float().mean()),
        rarest=float(counts.min()) / len(x),
        distance=judge.distance(x, test.x),
        distance_real=judge.distance(train.x, test.x),
        distance_gaussian=judge.distance(gaussian_like(train.x, len(x)), test.x),
    )
