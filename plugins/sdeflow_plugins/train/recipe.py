"""What is trained, and how: `Recipe`, the whole of a run's config.yaml."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import Dataset

from sdeflow.denoiser import Denoiser
from sdeflow.errors import ArgumentError, one_of, positive_int
from sdeflow.loss import TIMES, WEIGHTINGS
from sdeflow.sde import GaussianSDE

from ..build import build


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
        steps: optimizer steps in all.
        batch_size: samples per step, over all processes together.
        lr: the peak learning rate of AdamW.
        schedule: of the rate after the warm-up: cosine (down to zero at the last step) or constant.
        warmup: steps over which the rate rises to its peak.
        weight_decay: of AdamW.
        clip: the largest norm of a gradient; longer ones are scaled down to it.
        ema: the decay of the moving average of the weights; less early on, (1 + n)/(10 + n).
        seed: of the initial weights, the order of the data, the noise; a whole number >= 0.
        precision: fp32, bf16 (mixed), or auto: bf16 on a CUDA device that has it, else fp32.
        device: auto, cpu or cuda.
        threads: CPU threads of torch; 0 leaves them as they are.
        workers: processes that read the data ahead; 0 reads in this one.
        log_every: steps between two lines of metrics.csv.
        save_every: steps between two checkpoints, each with a picture of samples.
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
    steps: int = 4000
    batch_size: int = 64
    lr: float = 2e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.998
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    workers: int = 0
    log_every: int = 50
    save_every: int = 1000

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "save_every"):
            positive_int(name, getattr(self, name))
        for name in ("warmup", "seed", "threads", "workers"):
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
        one_of("times", self.times, TIMES)
        one_of("weighting", self.weighting, WEIGHTINGS)
        one_of("schedule", self.schedule, ("cosine", "constant"))
        one_of("precision", self.precision, ("auto", "fp32", "bf16"))
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

    def make_network(self, shape: tuple[int, ...]) -> nn.Module:
        """A network with the initial weights of the recipe's seed; no global generator moves."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            return build("network", self.network, self.network_options, shape=shape)

    def make_denoiser(self, network: nn.Module) -> Denoiser:
        """The network read as a denoiser."""
        return Denoiser(network, self.make_sde(), self.prediction)

    # ---- as a file

    def save(self, path: Path) -> None:
        """Write the recipe as YAML; `sdeflow train --config` reads it."""
        import yaml

        plain = dataclasses.asdict(self)
        path.write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")

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
        free = {"steps", "log_every", "save_every", "threads", "workers", "device"}
        names = [f.name for f in dataclasses.fields(self) if f.name not in free]
        return [n for n in names if getattr(self, n) != getattr(other, n)]
