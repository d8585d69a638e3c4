"""What is trained, and how: `Recipe`, the whole of a run's config.yaml."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from sdeflow.denoiser import Denoiser
from sdeflow.errors import ArgumentError, one_of, positive_int
from sdeflow.loss import TIMES, WEIGHTINGS
from sdeflow.plugins import plugins
from sdeflow.sde import GaussianSDE

from ..build import build, option_names
from .average import WIDEST


@dataclass(frozen=True)
class Recipe:
    """The configuration of a training run.

    Plugins are given by name (`sdeflow list` prints them), their options beside them, each on its
    own (`--sde vp --sde_options.beta_max 15`) or together (`--network_options '{"layers": 2}'`).

    Args:
        data: the data set, such as digits, moons or folder.
        data_options: of the data set, such as --data_options.path ~/pictures.
        network: the network, such as unet or mlp.
        network_options: of the network, such as --network_options.channels '[32, 64]'.
        sde: the forward SDE; it must have a Gaussian kernel.
        sde_options: of the SDE, such as --sde_options.s 0.01.
        prediction: what the network predicts: noise, data, v, velocity, score or edm.
        times: the law of the training times: uniform, lognormal, logit_normal or log_snr.
        weighting: of the loss: prediction (the error of the network's own output), noise, data,
            likelihood, edm or min_snr.
        conditional: whether the network learns the classes of a labelled data set.
        label_dropout: the share of labels replaced by "no class", for classifier-free guidance.
        steps: optimizer steps in all.
        batch_size: samples per step, over all processes and parts together; a data set with fewer
            rows repeats within a batch.
        accumulate: parts that a batch is evaluated in, one after another, where memory is short.
        lr: the peak learning rate of AdamW.
        schedule: of the rate after the warm-up: cosine (down to zero at the last step) or constant.
        warmup: steps over which the rate rises to its peak.
        weight_decay: of AdamW.
        clip: the largest norm of a gradient; longer ones are scaled down to it.
        ema_kind: of the moving average of the weights: constant (decay `ema`; less early on,
            (1 + n)/(10 + n)) or power (a fixed share of the run so far, `ema_width`).
        ema: the decay of the constant average.
        ema_width: the relative width sigma_rel of the power average, up to 0.28: the standard
            deviation of its profile over the steps, as a share of the run so far.
        posthoc_every: steps between two snapshots for post-hoc averages; 0 takes none.
        posthoc_widths: the relative widths of the averages in the snapshots.
        seed: of the initial weights, the order of the data, the noise; a whole number >= 0.
        precision: fp32, bf16 (mixed), or auto: bf16 on a CUDA device that has it, else fp32. On a
            CPU with bf16 instructions bf16 takes 0.9 (digits) to 0.6 (three levels at 32 x 32) of
            the time, but its numbers depend on how a batch is split.
        compile: whether torch.compile makes the network's kernels; it needs a C++ compiler.
        device: auto, cpu or cuda.
        strategy: of several processes: ddp (each holds all weights), fsdp (sharded), or auto: ddp.
        threads: CPU threads of torch; 0 leaves them as they are.
        workers: processes that read the data ahead; 0 reads in this one.
        log_every: steps between two lines of metrics.csv.
        save_every: steps between two checkpoints.
        preview_every: steps between two pictures of samples; 0 makes one with each checkpoint.
        keep: checkpoints kept, counted from the last.
        tensorboard: whether TensorBoard files are written too (the extra sdeflow[tensorboard]).
    """

    data: str = "digits"
    data_options: dict[str, Any] = field(default_factory=dict)
    network: str = "unet"
    network_options: dict[str, Any] = field(default_factory=dict)
    sde: str = "cosine"
    sde_options: dict[str, Any] = field(default_factory=dict)
    prediction: str = "v"
    times: str = "uniform"
    weighting: str = "prediction"
    conditional: bool = False
    label_dropout: float = 0.1
    steps: int = 4000
    batch_size: int = 64
    accumulate: int = 1
    lr: float = 2e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    ema_kind: Literal["constant", "power"] = "constant"
    ema: float = 0.998
    ema_width: float = 0.1
    posthoc_every: int = 0
    posthoc_widths: list[float] = field(default_factory=lambda: [0.05, 0.1])
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    threads: int = 0
    workers: int = 0
    log_every: int = 50
    save_every: int = 1000
    preview_every: int = 0
    keep: int = 2
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "save_every", "keep"):
            positive_int(name, getattr(self, name))
        for name in ("warmup", "seed", "threads", "workers", "preview_every", "posthoc_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ArgumentError(f"{name}={value!r} must be a whole number >= 0")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ArgumentError(f"{name}={value!r} must be a finite number > 0")
        if not 0 <= self.ema < 1:
            raise ArgumentError(f"ema={self.ema!r} must be in [0, 1), such as 0.999")
        if not 0 <= self.weight_decay < math.inf:
            raise ArgumentError(f"weight_decay={self.weight_decay!r} must be a finite number >= 0")
        if not 0 <= self.label_dropout < 1:
            raise ArgumentError(f"label_dropout={self.label_dropout!r} must be in [0, 1)")
        if self.batch_size % self.accumulate:
            raise ArgumentError(
                f"batch_size={self.batch_size} must be a multiple of accumulate={self.accumulate}: "
                "the parts of a batch are of one size"
            )
        for name, widths in (
            ("ema_width", [self.ema_width]),
            ("posthoc_widths", self.posthoc_widths),
        ):
            for width in widths:
                if not 0 < width <= WIDEST:
                    raise ArgumentError(f"{name}={width!r} must be in (0, {WIDEST}], such as 0.1")
        if not self.posthoc_widths or len(set(self.posthoc_widths)) < len(self.posthoc_widths):
            raise ArgumentError(
                f"posthoc_widths={self.posthoc_widths} must be distinct, such as [0.05, 0.1]"
            )
        object.__setattr__(self, "posthoc_widths", [float(w) for w in self.posthoc_widths])
        if "classes" in self.network_options:
            raise ArgumentError(
                "network_options: classes follows from the data set; use conditional=True"
            )
        one_of("times", self.times, TIMES)
        one_of("weighting", self.weighting, WEIGHTINGS)
        one_of("schedule", self.schedule, ("cosine", "constant"))
        one_of("ema_kind", self.ema_kind, ("constant", "power"))
        one_of("precision", self.precision, ("auto", "fp32", "bf16"))
        one_of("strategy", self.strategy, ("auto", "ddp", "fsdp"))
        one_of("device", self.device, ("auto", "cpu", "cuda"))
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ArgumentError("device='cuda': torch sees no CUDA device here; use auto or cpu")

    # ---- from names to objects

    def make_dataset(self, split: str = "train") -> Dataset:
        """The data set of a split; it has `shape`, that of one sample."""
        return build("dataset", self.data, self.data_options, split=split)

    def make_sde(self) -> GaussianSDE:
        """The forward SDE."""
        sde = build("sde", self.sde, self.sde_options)
        if not isinstance(sde, GaussianSDE):
            raise ArgumentError(
                f"sde={self.sde!r} has no Gaussian kernel, which denoising score matching needs; "
                "use one that has, such as vp, cosine, ve or edm"
            )
        return sde

    def count_classes(self, dataset: Dataset) -> int:
        """The classes K that the network is to learn, labels 0..K-1; 0 for unconditional training.

        A data set without labels, or with labels outside 0..K-1, is refused.
        """
        if not self.conditional:
            return 0
        labels = getattr(dataset, "labels", None)
        if labels is None or not len(labels):
            raise ArgumentError(
                f"conditional=True needs a labelled data set; data={self.data!r} has no labels: "
                "leave conditional out, or use data with classes, such as digits"
            )
        labels = torch.as_tensor(labels)
        rows = len(dataset)  # type: ignore[arg-type]
        if labels.shape != (rows,) or labels.is_floating_point() or labels.is_complex():
            raise ArgumentError(
                f"data={self.data!r}: labels have shape {tuple(labels.shape)} and {labels.dtype}; "
                f"they must be whole numbers ({rows},), one a sample"
            )
        low, high = int(labels.min()), int(labels.max())
        classes = int(getattr(dataset, "classes", 0)) or high + 1
        if low < 0 or high >= classes:
            raise ArgumentError(
                f"data={self.data!r}: labels run from {low} to {high}; they must be in "
                f"0..{classes - 1}, for {classes} classes"
            )
        return classes

    def make_network(self, shape: tuple[int, ...], classes: int = 0) -> nn.Module:
        """A network with the initial weights of the recipe's seed; no global generator moves.

        classes: as `count_classes` says; 0 for an unconditional network.
        """
        if bool(classes) != self.conditional:
            raise ArgumentError(
                f"classes={classes} and conditional={self.conditional}: a conditional network, and "
                "only that, needs classes >= 1; they are count_classes(dataset)"
            )
        given: dict[str, int] = {}
        if classes:
            names = option_names(plugins().find("network", self.network).factory)
            if not names & {"classes", "**"}:
                raise ArgumentError(
                    f"conditional=True: network {self.network!r} takes no `classes`; use one that "
                    "does, such as unet, or leave conditional out"
                )
            given = {"classes": classes}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            return build("network", self.network, self.network_options, shape=shape, **given)

    def make_denoiser(self, network: Callable[[Tensor, Tensor], Tensor]) -> Denoiser:
        """The network read as a denoiser; a conditional one as partial(network, label=label)."""
        return Denoiser(network, self.make_sde(), self.prediction)

    # ---- as a file

    def save(self, path: Path) -> None:
        """Write the recipe as YAML; `sdeflow train --config` reads it."""
        path.write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """The recipe as YAML."""
        import yaml

        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """The recipe in a YAML file; unknown keys are refused."""
        import yaml

        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ArgumentError(f"{path} cannot be read as a recipe: {error}") from error
        if not isinstance(found, Mapping):
            raise ArgumentError(f"{path} must hold `name: value` lines, one for each option")
        names = [f.name for f in dataclasses.fields(cls)]
        for name in found:
            one_of(f"{path}: option", name, names)
        return cls(**found)

    def differences(self, other: Recipe) -> list[str]:
        """The options in which two recipes differ, less those that may change on resuming."""
        free = {"steps", "log_every", "save_every", "preview_every", "keep", "tensorboard"}
        free |= {"threads", "workers", "device", "strategy", "compile", "accumulate"}
        names = [f.name for f in dataclasses.fields(self) if f.name not in free]
        return [n for n in names if getattr(self, n) != getattr(other, n)]
