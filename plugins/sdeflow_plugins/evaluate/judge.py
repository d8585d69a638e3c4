"""A classifier trained on real data, which judges generated ones.

The judge is trained on the real training data before it sees a generated sample, and is itself
checked on held-out ones. Of images, the pooled output of its last convolution carries a Frechet
distance, as Inception's does in the FID. (These features, and no later layer's, were chosen on
real images alone: a thousand real digits drawn at random are at 1.3 times the distance of all
training digits there, and at 1.4 at most; one layer on the chance imbalance of ten classes makes it
1.7, up to 2.6.) Source of the distance: Heusel et al. (2017), eq. 6.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sdeflow.errors import ArgumentError

from ..pictures import is_image
from .distances import frechet_distance
from .real import BATCH, labels_of, selection, take

SURE = 0.8
SEEN = 300_000
"""Images that a judge is shown, about; fewer than 25 rounds of a large data set do."""
STEPS = 1000
"""Of the training of a judge of states, at least: they are small, and may be few."""
MOST = 20_000
"""Images that a judge is trained on: at most so many, held in memory."""


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

    def accuracy(self, data: Any) -> float:
        """The share of the images whose label the judge finds."""
        return accuracy(self, data)

    @torch.no_grad()
    def distance(self, x: Tensor, real: Tensor) -> float:
        """The Frechet distance of two sets of images in the feature space."""
        return frechet_distance(self.features(x), self.features(real))


class StateJudge(nn.Sequential):
    """A small classifier of vectors, series and other states (B, *) that are no images."""

    def __init__(self, size: int, classes: int) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(size, 128),
            nn.SiLU(),
            nn.Dropout(0.1),
            nn.Linear(128, 128),
            nn.SiLU(),
            nn.Linear(128, classes),
        )


def train_judge(data: Any, epochs: int = 0, seed: int = 0) -> Judge:
    """A judge trained on labelled images: cross-entropy, AdamW, one cycle of the rate.

    The same weights for the same data and seed; the global generator is left where it was.
    epochs: 0 takes 25, or fewer where the data are many.
    """
    if not is_image(data.shape):
        raise ArgumentError(
            f"samples of shape {tuple(data.shape)} are no images (1 or 3, H, W); a judge of other "
            "states is made by train_state_judge"
        )
    judge = _train(lambda classes: Judge(data.shape[0], classes), data, epochs, seed)
    assert isinstance(judge, Judge)
    return judge


def train_state_judge(data: Any, epochs: int = 0, seed: int = 0) -> nn.Module:
    """A classifier of labelled states that are no images, trained as a judge is."""
    size = torch.Size(data.shape).numel()
    return _train(lambda classes: StateJudge(size, classes), data, epochs, seed, STEPS)


@torch.no_grad()
def predictions(judge: nn.Module, x: Tensor) -> Tensor:
    """The class that the judge sees in each sample, (N,), batch by batch."""
    return torch.cat([judge(part).argmax(1) for part in x.split(BATCH)])


def accuracy(judge: nn.Module, data: Any) -> float:
    """The share of a labelled data set's samples whose label the judge finds."""
    places = selection(len(data), MOST)
    found = predictions(judge, take(data, places))
    return float((found == _labels(data)[places]).float().mean())


def _train(make: Any, data: Any, epochs: int, seed: int, least: int = 0) -> nn.Module:
    labels = _labels(data)
    places = selection(len(data), MOST)
    x, y, n = take(data, places), labels[places], len(places)
    batch = min(64, n)
    batches = n // batch
    epochs = epochs or max(4, min(25, SEEN // n), least // batches)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = make(int(labels.max()) + 1)
        optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.01)
        rate = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=4e-3, total_steps=epochs * batches
        )
        for _ in range(epochs):
            for index in torch.randperm(n)[: batches * batch].split(batch):
                loss = nn.functional.cross_entropy(judge(x[index]), y[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rate.step()
    return judge.eval()


def _labels(data: Any) -> Tensor:
    labels = labels_of(data)
    if labels is None:
        raise ArgumentError("the data set has no labels; a judge is trained on labelled data")
    return labels
