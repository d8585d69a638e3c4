"""A drawing: what stands at each place of a list of samples, and how a batch of them is made."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdeflow.errors import ArgumentError
from sdeflow.sample import Solution

from ..pictures import is_image
from .condition import Condition
from .edit import edit, load_images
from .interpolate import between_seeds, between_states
from .sampler import Sampler

Ends = tuple[int, int] | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Drawing:
    """Samples in rows: of each class, or of each image, one for each seed, or on the way from one
    end to the other.

    shape: of one sample. labels: the class at each place, or None. images: the image at each place
    to begin from, with the `strength` of `edit`. ends: two seeds, or two states, to go between;
    `u` says how far at each place. rows, tops: names for the picture.
    """

    condition: Condition
    sampler: Sampler
    steps: int
    shape: tuple[int, ...]
    device: torch.device
    seeds: list[int]
    labels: Tensor | None = None
    images: Tensor | None = None
    strength: float = 1.0
    ends: Ends | None = None
    u: Tensor | None = None
    rows: tuple[str, ...] = ()
    tops: tuple[str, ...] = ()

    def draw(
        self, seeds: list[int], places: slice, *, keep: bool = False, progress: bool = False
    ) -> Solution:
        """The samples at these places of the list, whose seeds are `seeds`."""
        labels = None if self.labels is None else self.labels[places].to(self.device)
        process = self.sampler.process(self.condition.model(labels))
        settings: dict[str, Any] = self.sampler.settings(self.steps)
        settings |= {"keep": keep, "progress": progress}
        if self.images is not None:
            x0 = self.images[places].to(self.device)
            return edit(process, x0, self.strength, seed=seeds, **settings)
        if self.ends is not None:
            assert self.u is not None
            u, (first, last) = self.u[places], self.ends
            if isinstance(first, Tensor) and isinstance(last, Tensor):
                states = first.to(self.device), last.to(self.device)
                return between_states(process, states, u, **settings)
            assert isinstance(first, int) and isinstance(last, int)
            pair = first, last
            return between_seeds(process, pair, u, self.shape, device=self.device, **settings)
        return self.sampler.run(
            self.condition.model(labels),
            (len(seeds), *self.shape),
            self.steps,
            seeds,
            self.device,
            progress=progress,
            keep=keep,
        )

    def picture(self, x: Tensor) -> tuple[Tensor, int]:
        """What the picture shows of all samples x, and in how many columns, 0 for about a square.

        Images that the samples began from stand before them.
        """
        if not self.tops:
            return x, 0
        if self.images is None:
            return x, len(self.tops)
        columns = len(self.tops) - 1
        given = self.images[::columns, None].cpu()
        return torch.cat((given, x.unflatten(0, (-1, columns))), 1).flatten(0, 1), columns + 1

    def first(self, rows: int, columns: int, most: int) -> Drawing:
        """The drawing of the first `columns` of each of its rows, and of `most` samples in all."""
        width = len(self.seeds) // rows
        places = [row * width + k for row in range(rows) for k in range(min(columns, width))][:most]

        def kept(each: Tensor | None) -> Tensor | None:
            return None if each is None else each[places]

        seeds = [self.seeds[k] for k in places]
        labels, images, u = kept(self.labels), kept(self.images), kept(self.u)
        return replace(self, seeds=seeds, labels=labels, images=images, u=u)

    def fingerprint(self) -> str:
        """A name for all that the samples depend on beside their seeds."""
        condition, sampler = self.condition, self.sampler
        found = hashlib.sha256(repr((sampler, self.steps, self.shape, self.strength)).encode())
        found.update(repr((condition.w, condition.interval)).encode())
        told: list[Any] = [self.labels, self.images, self.u, *(self.ends or ())]
        for model in (condition.denoiser, condition.weak):
            if model is not None:
                told += [repr((model.sde, model.prediction))]
                told += getattr(model.net, "state_dict", dict)().values()
        for each in told:
            numbers = isinstance(each, Tensor)
            found.update(
                each.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
                if numbers
                else repr(each).encode()
            )
        return found.hexdigest()


def arrange(
    base: Drawing,
    names: list[str],
    image: str,
    strength: float | None,
    between: str,
    ink: bool,
) -> Drawing:
    """The drawing that options ask for: `base`, whose seeds are those of one row, with every row.

    names: of the classes. image, strength: to begin from; between: two ends, "7,12" or two files.
    """
    classes, seeds = base.condition.classes, base.seeds
    if image and between:
        raise ArgumentError("image and interpolate are two things to do: leave one of them out")
    if image and len(classes) > 1:
        raise ArgumentError(
            f"image goes with one class at most, and {len(classes)} were given: leave class out, "
            "or give one"
        )
    tops = tuple(f"{seed}" for seed in seeds)
    if image:
        x0, files = load_images(image, base.shape, ink)
        labels = torch.full((len(x0) * len(seeds),), classes[0]) if classes else None
        return replace(
            base,
            seeds=seeds * len(x0),
            labels=labels,
            images=x0.repeat_interleave(len(seeds), 0),
            strength=0.6 if strength is None else strength,
            rows=tuple(files),
            tops=("given", *tops),
        )
    if between:
        u = torch.linspace(0, 1, len(seeds), dtype=torch.float64)
        tops = tuple(f"{float(way):.2g}" for way in u)
        base = replace(base, ends=_ends(between, base.shape, ink), u=u.repeat(max(1, len(classes))))
    if not classes:
        return replace(base, tops=tops if between else ())
    labels = torch.tensor(classes).repeat_interleave(len(seeds))
    several = len(classes) > 1
    return replace(
        base,
        seeds=seeds * len(classes),
        labels=labels,
        rows=tuple(names[k] for k in classes) if several else (),
        tops=tops if several or between else (),
    )


def _ends(between: str, shape: tuple[int, ...], ink: bool) -> Ends:
    """Two seeds, or the states in two image files."""
    parts = [part.strip() for part in between.strip("[]() ").split(",")]
    if len(parts) == 2 and all(part.isdecimal() and part.isascii() for part in parts):
        return int(parts[0]), int(parts[1])
    if len(parts) == 2 and is_image(shape) and all(Path(p).expanduser().is_file() for p in parts):
        first, last = (load_images(part, shape, ink)[0][0] for part in parts)
        return first, last
    raise ArgumentError(
        f"interpolate={between!r} must be two seeds, such as 7,12, or two image files, such as "
        "a.png,b.png"
    )
