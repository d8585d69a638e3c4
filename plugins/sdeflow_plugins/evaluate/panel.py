"""The panel: every metric that applies to a data set, with its error bar, and why others do not.

Features of the real data are computed once; then any number of sample sets are measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sdeflow.errors import ArgumentError, NonFiniteError, ShapeError, positive_int

from ..pictures import is_image
from .bootstrap import Estimate, Statistic, estimate, mean_of
from .distances import frechet, kernel, sliced
from .features import Features, fingerprint, hash_of, judge_features, load_features, state_features
from .judge import Judge, accuracy, predictions, train_judge, train_state_judge
from .manifolds import manifolds
from .memorisation import Nearest, nearer, nearest
from .real import batches, labels_of, selection, take

WIDEST = 4096
"""Features of a Frechet distance: the matrices of more take minutes and memory."""
FEWEST = 6
"""Samples that nearest neighbours need."""


class Metric(NamedTuple):
    """label: in a table. better: where good samples lie. items: what the error bar draws again."""

    label: str
    better: str
    items: str = "samples"


# fmt: off
METRICS: dict[str, Metric] = {
    # name                        label in a table               better    drawn again
    "frechet_distance":    Metric("Fréchet distance",            "low"),
    "kernel_distance":     Metric("kernel distance (KID) x 1000", "low"),
    "sliced_wasserstein":  Metric("sliced Wasserstein distance", "low"),
    "precision":           Metric("precision",                   "high"),
    "recall":              Metric("recall",                      "high",   "held-out data"),
    "density":             Metric("density",                     "high"),
    "coverage":            Metric("coverage",                    "high",   "held-out data"),
    "accuracy":            Metric("class as asked",              "high"),
    "nearer":              Metric("nearer to training data",     "half"),
    "memorised":           Metric("memorised",                   "low"),
}
# fmt: on
KID_SCALE = 1000.0


@dataclass(frozen=True)
class Measured:
    """What one set of samples measures.

    metrics: by name. per_class: for each class the share of samples that the judge puts there, of
    those that were asked for it. neighbours: the nearest training data, for a picture.
    """

    metrics: dict[str, Estimate]
    per_class: dict[str, float] = field(default_factory=dict)
    neighbours: Nearest | None = None


class Panel:
    """The metrics of a data set.

    train, test: the two splits. features: "auto" (the judge of labelled images, else the states),
    "judge", "state", or as `load_features` takes it, with its options and weights.
    most: real samples of each split that distances use; nearest neighbours look at all.
    judge: one that is trained already. wanted: metrics by name; all that apply unless given.

    Distances, precision and recall compare with the held-out data; memorisation asks for the
    nearest training data. `left_out` says why a metric is missing.
    """

    def __init__(
        self,
        train: Any,
        test: Any,
        features: str = "auto",
        feature_options: Mapping[str, Any] | None = None,
        feature_weights: str = "",
        most: int = 5000,
        device: torch.device | str = "cpu",
        judge: Judge | None = None,
        wanted: list[str] | None = None,
    ) -> None:
        self.train, self.test = train, test
        self.shape = tuple(train.shape)
        self.class_names = list(getattr(train, "class_names", None) or [])
        self.left_out: dict[str, str] = {}
        self.notes: list[str] = []
        self.wanted = list(METRICS) if wanted is None else wanted
        places = selection(len(test), positive_int("most", most))
        self.held_out = take(test, places)
        if len(self.held_out) < FEWEST:
            raise ArgumentError(
                f"the data set holds out {len(self.held_out)} samples; a comparison needs at least "
                f"{FEWEST}"
            )
        labels = labels_of(test)
        self.held_out_labels = None if labels is None else labels[places]
        self.real = take(train, selection(len(train), most))
        self.judge = judge or self._train_judge(features)
        self.features = self._pick_features(features, feature_options, feature_weights, device)
        self.held_features = self.features(self.held_out)
        self.judge_accuracy = None if self.judge is None else accuracy(self.judge, test)
        if self.judge_accuracy is not None and self.judge_accuracy < 0.9:
            self.notes.append(
                f"the judge finds the class of {self.judge_accuracy:.0%} of the held-out data "
                "only: what it says of samples means little"
            )
        if self.held_features.shape[1] > WIDEST:
            self.left_out["frechet_distance"] = (
                f"{self.held_features.shape[1]} features make too large a covariance (more than "
                f"{WIDEST}); choose a network with --features"
            )
        self.neighbours = self._neighbours(self.held_out) if self._wants_neighbours else None

    def measure(
        self, x: Tensor, labels: Tensor | None = None, replicates: int = 200, seed: int = 0
    ) -> Measured:
        """All metrics of samples x (n, *shape); labels: the class that each was asked to be."""
        self._check(x, labels)
        found = {"neighbours": self._neighbours(x) if self._wants_neighbours else None}
        metrics = self._measure(x, labels, found["neighbours"], replicates, seed)
        per_class = self._per_class(x, labels) if labels is not None else {}
        return Measured(metrics, per_class, found["neighbours"])

    def floor(self, n: int, replicates: int = 200, seed: int = 0) -> Measured:
        """What real data measure: n training samples as though they were generated.

        Of what is no comparison with held-out data it says what the held-out data themselves are:
        how far from the training data, and how well judged.
        """
        x = self.real[selection(len(self.real), max(FEWEST, n))]
        metrics = self._measure(x, None, None, replicates, seed)
        if self.neighbours is not None:
            metrics |= self._memorisation(self.neighbours, replicates, seed)
        per_class = {}
        if self.judge is not None and self.held_out_labels is not None:
            hits = (predictions(self.judge, self.held_out) == self.held_out_labels).double()
            metrics["accuracy"] = estimate(mean_of(hits), len(hits), replicates, seed)
            per_class = self._per_class(self.held_out, self.held_out_labels)
        return Measured({k: metrics[k] for k in METRICS if k in metrics}, per_class)

    @property
    def version(self) -> str:
        """A hash of all that a figure depends on beside the samples: data, features, judge."""
        judge = fingerprint(self.judge) if self.judge is not None else ""
        real = hash_of(self.held_out, self.held_features)
        return "-".join((real, self.features.version or self.features.name, judge))

    # ---- one by one

    def _measure(
        self,
        x: Tensor,
        labels: Tensor | None,
        neighbours: Nearest | None,
        replicates: int,
        seed: int,
    ) -> dict[str, Estimate]:
        n, found = len(x), self.features(x)
        statistics: dict[str, tuple[Statistic, int]] = {}
        if self._wants("frechet_distance"):
            statistics["frechet_distance"] = frechet(found, self.held_features), n
        if self._wants("kernel_distance"):
            mmd = kernel(found, self.held_features)
            statistics["kernel_distance"] = (lambda counts: KID_SCALE * mmd(counts)), n
        if self._wants("sliced_wasserstein"):
            statistics["sliced_wasserstein"] = sliced(x, self.held_out), n
        if any(map(self._wants, ("precision", "recall", "density", "coverage"))):
            values = manifolds(found, self.held_features)
            for name, each in values._asdict().items():
                if self._wants(name):
                    statistics[name] = mean_of(each), len(each)
        if labels is not None and self.judge is not None and self._wants("accuracy"):
            hits = predictions(self.judge, x) == labels
            statistics["accuracy"] = mean_of(hits), n
        metrics = {k: estimate(f, m, replicates, seed) for k, (f, m) in statistics.items()}
        if neighbours is not None:
            metrics |= self._memorisation(neighbours, replicates, seed)
        return metrics

    def _memorisation(self, found: Nearest, replicates: int, seed: int) -> dict[str, Estimate]:
        assert self.neighbours is not None
        values = {"nearer": nearer(found, self.neighbours), "memorised": found.copies}
        return {
            name: estimate(mean_of(each), len(each), replicates, seed)
            for name, each in values.items()
            if self._wants(name)
        }

    def _neighbours(self, x: Tensor) -> Nearest:
        return nearest(x, batches(self.train))

    def _per_class(self, x: Tensor, labels: Tensor) -> dict[str, float]:
        if self.judge is None:
            return {}
        hits = (predictions(self.judge, x) == labels).double()
        return {self.class_name(int(k)): float(hits[labels == k].mean()) for k in labels.unique()}

    def class_name(self, k: int) -> str:
        """What class k is called."""
        return self.class_names[k] if k < len(self.class_names) else str(k)

    # ---- what applies

    def _wants(self, name: str) -> bool:
        return name in self.wanted and name not in self.left_out

    @property
    def _wants_neighbours(self) -> bool:
        return self._wants("nearer") or self._wants("memorised")

    def _train_judge(self, features: str) -> nn.Module | None:
        """A judge, if the data have labels and something asks for it."""
        if labels_of(self.train) is None:
            self.left_out["accuracy"] = "the data have no labels, so there is no class to be asked"
            return None
        image = is_image(self.shape)
        if "accuracy" not in self.wanted and not (image and features in ("auto", "judge")):
            return None
        return train_judge(self.train) if image else train_state_judge(self.train)

    def _pick_features(
        self,
        name: str,
        options: Mapping[str, Any] | None,
        weights: str,
        device: torch.device | str,
    ) -> Features:
        if name == "auto":
            name = "judge" if isinstance(self.judge, Judge) else "state"
            if name == "state" and is_image(self.shape):
                self.notes.append(
                    "distances are between pixels, for the data have no labels to train a "
                    "classifier on; a network's features say more: --features module:object"
                )
        if name not in ("judge", "state"):
            return load_features(name, options, weights, device)
        if options or weights:
            raise ArgumentError(f"features={name!r} takes no options and no weights")
        if name == "state":
            return state_features()
        if not isinstance(self.judge, Judge):
            raise ArgumentError(
                "features='judge' needs labelled images (1 or 3, H, W); use --features state, or "
                "a network of your own: module:object"
            )
        return judge_features(self.judge)

    def _check(self, x: Tensor, labels: Tensor | None) -> None:
        if tuple(x.shape[1:]) != self.shape:
            raise ShapeError(
                f"samples have shape {tuple(x.shape)}; they must be (n, "
                f"{', '.join(map(str, self.shape))}), as the data set's"
            )
        if len(x) < FEWEST:
            raise ArgumentError(f"{len(x)} samples are too few; a comparison needs {FEWEST}")
        if not bool(x.isfinite().all()):
            bad = int((~x.flatten(1).isfinite().all(1)).sum())
            raise NonFiniteError(f"{bad} of {len(x)} samples hold NaN or infinity")
        if labels is not None and labels.shape != (len(x),):
            raise ShapeError(f"labels have shape {tuple(labels.shape)}; they must be ({len(x)},)")
