"""How good are generated images? A classifier trained on real ones judges them.

The judge is trained on the real training images before it sees a generated one, and is itself
checked on held-out images. The pooled output of its last convolution carries a Frechet distance, as
Inception's does in the FID. (These features, and no later layer's, were chosen on real images
alone: a thousand real digits drawn at random are at 1.3 times the distance of all training digits
there, and at 1.4 at most; one layer on the chance imbalance of ten classes makes it 1.7, up to
2.6.) Source of the distance: Heusel et al. (2017), eq. 6.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdeflow.errors import ArgumentError

from ..data import TensorData
from .distances import frechet_distance

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


def _labels(data: TensorData) -> Tensor:
    if data.labels is None:
        raise ArgumentError("the data set has no labels; a judge is trained on labelled images")
    return data.labels
