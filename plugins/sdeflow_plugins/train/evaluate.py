"""How good are generated images? A classifier trained on real ones judges them.

The judge is trained on the real training images before it sees a generated one, and is itself
checked on held-out images. The pooled output of its last convolution carries a Frechet distance, as
Inception's does in the FID. (These features, and no later layer's, were chosen on real images
alone: a thousand real digits drawn at random are at 1.3 times the distance of all training digits
there, and at 1.4 at most; one layer on the chance imbalance of ten classes makes it 1.7, up to
2.6.) Source of the distance: Heusel et al. (2017), eq. 6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdeflow.errors import ArgumentError, ShapeError

from ..data import TensorData

SURE = 0.8


class Judge(nn.Module):
    """A small convolutional classifier of images (B, C, H, W), with 256 features: the output of
    its last convolution, averaged over the quarters of the image."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()

        def convolution(before: int, after: int, stride: int = 1) -> list[nn.Module]:
            layer = nn.Conv2d(before, after, 3, stride, padding=1)
            return [layer, nn.BatchNorm2d(after), nn.ReLU()]

        self.body = nn.Sequential(
            *convolution(channels, 32), *convolution(32, 64, stride=2), *convolution(64, 64)
        )
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 16, 64),
            nn.ReLU(),
            nn.Linear(64, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The logits, (B, classes)."""
        return self.head(self.body(x))

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """The features, (B, 256)."""
        return nn.functional.adaptive_avg_pool2d(self.body(x), 2).flatten(1)

    @torch.no_grad()
    def probabilities(self, x: Tensor) -> Tensor:
        """p(class | x), (B, classes)."""
        return self(x).softmax(1)

    @torch.no_grad()
    def accuracy(self, data: TensorData) -> float:
        """The share of the images whose label the judge finds."""
        return float((self(data.x).argmax(1) == _labels(data)).float().mean())

    @torch.no_grad()
    def distance(self, x: Tensor, real: Tensor) -> float:
        """The Frechet distance of two sets of images in the feature space."""
        return frechet_distance(self.features(x), self.features(real))


def train_judge(data: TensorData, epochs: int = 25, seed: int = 0) -> Judge:
    """A judge trained on labelled images: cross-entropy, AdamW, one cycle of the rate.

    The same weights for the same data and seed; the global generator is left where it was.
    """
    labels = _labels(data)
    batch = min(64, len(data))
    batches = len(data) // batch
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge(data.shape[0], int(labels.max()) + 1)
        optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.01)
        rate = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=4e-3, total_steps=epochs * batches
        )
        for _ in range(epochs):
            for index in torch.randperm(len(data))[: batches * batch].split(batch):
                loss = nn.functional.cross_entropy(judge(data.x[index]), labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rate.step()
    return judge.eval()


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


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two sets of vectors (N, d), N > 1."""
    for name, rows in (("a", a), ("b", b)):
        if rows.ndim != 2 or len(rows) < 2:
            raise ShapeError(f"{name} has shape {tuple(rows.shape)}; it must be (N, d), N > 1")
    a, b = a.double(), b.double()
    c_a, c_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    values, vectors = torch.linalg.eigh(c_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c_b @ root).clamp_min(0).sqrt().sum()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    return float(shift + c_a.trace() + c_b.trace() - 2 * cross)


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 128) -> float:
    """The sliced 2-Wasserstein distance of two sets of states (N, *), for data without a judge.

    The mean over random directions of the distance of the sorted projections.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = a.flatten(1).double(), b.flatten(1).double()
    d = torch.randn(a.shape[1], directions, generator=generator, dtype=torch.float64)
    d = d / d.norm(dim=0)
    q = torch.linspace(0, 1, 512, dtype=torch.float64)
    gap = torch.quantile(a @ d, q, dim=0) - torch.quantile(b @ d, q, dim=0)
    return math.sqrt(float(gap.square().mean()))


def gaussian_like(x: Tensor, n: int, seed: int = 0) -> Tensor:
    """n draws from the Gaussian with the mean and full covariance of x (N, *)."""
    rows = x.flatten(1).double()
    values, vectors = torch.linalg.eigh(torch.cov(rows.T))
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, rows.shape[1], generator=generator, dtype=torch.float64)
    draws = rows.mean(0) + z * values.clamp_min(0).sqrt() @ vectors.T
    return draws.to(x.dtype).reshape(n, *x.shape[1:])


def _labels(data: TensorData) -> Tensor:
    if data.labels is None:
        raise ArgumentError("the data set has no labels; a judge is trained on labelled images")
    return data.labels
