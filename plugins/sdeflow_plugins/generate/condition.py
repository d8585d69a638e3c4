"""What samples are drawn towards: the classes, and how strongly, as a command line gives them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sdeflow.denoiser import Denoiser
from sdeflow.errors import ArgumentError, one_of, whole

from ..guidance import Within, cfg, guide, labelled

Class = int | str | Sequence[int | str] | None


@dataclass(frozen=True)
class Condition:
    """Classes, a weight, an interval of noise levels and a weaker model: how to guide.

    denoiser: of the run. classes: to draw, in order; empty for an unconditional draw.
    w: the weight, D_null + w (D_class - D_null), or D_weak + w (D - D_weak) where there is a `weak`
        denoiser; 1 is no guidance. interval: of sigma/alpha, where w counts; None for all.
    """

    denoiser: Denoiser
    classes: tuple[int, ...] = ()
    w: float = 1.0
    interval: tuple[float, float] | None = None
    weak: Denoiser | None = None

    @property
    def guided(self) -> bool:
        """Whether an evaluation takes more than one of the network for each sample."""
        return self.w != 1 and (self.weak is not None or self.w != 0)

    def model(self, labels: Tensor | None) -> Any:
        """What denoises a batch with these labels, (B,), or without any."""
        plain = self.denoiser if labels is None else labelled(self.denoiser, labels)
        if self.w == 1:
            return plain
        if self.weak is not None:
            knows = labels is not None and count_classes(self.weak)
            weak = labelled(self.weak, labels) if knows and labels is not None else self.weak
            steered = guide(plain, weak, self.w)
        else:
            assert labels is not None
            steered = cfg(self.denoiser, labels, self.w)
        return steered if self.interval is None else Within(steered, plain, *self.interval)


def condition(
    denoiser: Denoiser,
    names: Sequence[str],
    class_: Class = None,
    guidance: float | None = None,
    interval: Sequence[float] | None = None,
    weak: Denoiser | None = None,
) -> Condition:
    """The condition that options ask for, or an error that says what is wrong with them.

    names: of the classes, in order. class_: one or several, by number or by name, or "all".
    """
    chosen = choose_classes(class_, count_classes(denoiser), names)
    if guidance is not None and not math.isfinite(guidance):
        raise ArgumentError(f"guidance={guidance!r} must be a finite number, such as 2")
    if guidance is not None and weak is None and not chosen:
        if not count_classes(denoiser):
            raise ArgumentError(
                f"guidance={guidance:g}: this run is unconditional, so that there is no class to "
                "be guided to; train with --conditional true, or guide by a weaker run: --autoguide"
            )
        raise ArgumentError(
            f"guidance={guidance:g} needs a class to lead to: give --class 0, or --class all"
        )
    if weak is not None and guidance is None:
        raise ArgumentError("autoguide needs a weight: give --guidance 2, say")
    if weak is not None:
        check_weak(denoiser, weak)
    if interval is None:
        return Condition(denoiser, chosen, 1.0 if guidance is None else guidance, None, weak)
    if guidance is None:
        raise ArgumentError("guidance_interval needs a weight: give --guidance 2, say")
    if len(interval) != 2 or not 0 <= interval[0] < interval[1]:
        raise ArgumentError(
            f"guidance_interval={list(interval)} must be two noise levels sigma/alpha, 0 <= low < "
            "high, such as '[0.2, 2]'"
        )
    return Condition(denoiser, chosen, guidance, (interval[0], interval[1]), weak)


def choose_classes(class_: Class, classes: int, names: Sequence[str] = ()) -> tuple[int, ...]:
    """Class numbers 0..classes-1 from numbers, names or "all"; none for None."""
    if class_ is None:
        return ()
    if not classes:
        raise ArgumentError(
            f"class={class_!r}: this run is unconditional; leave class out, or train with "
            "--conditional true on labelled data"
        )
    if class_ == "all":
        return tuple(range(classes))
    asked = [class_] if isinstance(class_, int | str) else list(class_)
    if not asked:
        raise ArgumentError("class=[] is empty; give a class, several such as '[0, 1]', or all")
    return tuple(_number(each, classes, names) for each in asked)


def _number(asked: int | str, classes: int, names: Sequence[str]) -> int:
    number = whole(asked)
    if number is None and isinstance(asked, str) and asked not in names and asked.isdecimal():
        number = int(asked)
    if number is None:
        return list(names).index(one_of("class", asked, names))
    if not 0 <= number < classes:
        raise ArgumentError(f"class={number} must be in 0..{classes - 1}: the run has {classes}")
    return number


def count_classes(denoiser: Denoiser) -> int:
    """The number of classes that a denoiser's network takes; 0 where it takes none."""
    return int(getattr(denoiser.net, "classes", 0))


def check_weak(denoiser: Denoiser, weak: Denoiser) -> None:
    """Refuse a weak model of another process, or of other classes."""
    if weak.sde != denoiser.sde:
        raise ArgumentError(
            f"autoguide: that run has sde {weak.sde!r}, this one {denoiser.sde!r}; they must be "
            "the same: guidance takes the difference of the two at one x and t"
        )
    ours, theirs = count_classes(denoiser), count_classes(weak)
    if theirs and theirs != ours:
        raise ArgumentError(f"autoguide: that run has {theirs} classes, this one has {ours}")
