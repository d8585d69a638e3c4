"""Shards in WebDataset's form: tar files of key.jpg beside key.cls or key.json.

The webdataset package reads shards as a stream, in an order that depends on its buffers and the
number of workers. The standard library tells where each member lies, so that shards are read like
all other data here: any sample at any time, and a run that resumes sees the same ones.
"""

from __future__ import annotations

import glob
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdeflow.errors import ArgumentError
from sdeflow.plugins import Factory, hookimpl

from . import checked_labels, checked_split, held_out
from .folder import SUFFIXES
from .images import Broken, Color, Crop, Frame, ImageData

COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}
BLOCK = 512


class Members:
    """Members of tar files by number, each read from its place in the shard.

    shards: paths (S,). shard, offset, size: of each member (N,). names: inside the shard (N,).
    """

    def __init__(
        self,
        shards: list[str],
        shard: np.ndarray,
        offset: np.ndarray,
        size: np.ndarray,
        names: np.ndarray,
    ) -> None:
        self.shards, self.names = shards, names
        self.shard, self.offset, self.size = shard, offset, size

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, places: np.ndarray) -> Members:
        arrays = (self.shard, self.offset, self.size, self.names)
        return Members(self.shards, *(array[places] for array in arrays))

    def name(self, k: int) -> str:
        """Shard and member."""
        return f"{self.shards[self.shard[k]]}: {os.fsdecode(self.names[k])}"

    def file(self, k: int) -> io.BytesIO:
        """The bytes of member k."""
        with open(self.shards[self.shard[k]], "rb") as stream:
            stream.seek(int(self.offset[k]))
            return io.BytesIO(stream.read(int(self.size[k])))


def webdataset(
    split: str = "train",
    path: str = "",
    test_path: str = "",
    size: int = 64,
    color: Color = "rgb",
    crop: Crop = "center",
    crops: int = 0,
    flip: bool = True,
    image: str = "",
    label: str = "auto",
    classes: int = 0,
    broken: Broken = "refuse",
) -> ImageData:
    """WebDataset shards (.tar) of images, in random access; .cls or .json gives labels.

    The shards are indexed in memory at the start, about 5 s for 100,000 images with .cls; only
    headers and labels are read. They must not be compressed.

    Args:
        split: "train" or "test": every tenth sample is held out as "test", unless there is
            test_path.
        path: the shards, such as data/train-{000..146}.tar, data/*.tar, or one file.
        test_path: shards that are the "test" split, all of them.
        image: the extension of the image, such as jpg; "" is the only image of each sample.
        label: "cls" is the whole number in key.cls; another name is a field of key.json; "none";
            "auto": cls where there is one, else the field label of a .json, else none.
        classes: their number; 0 is the highest label and one.
        size, color, crop, crops, flip, broken: as of the data set folder.
    """
    checked_split(split)
    frame = Frame.of(split, size, color, crop, crops, flip)
    parts = {"train": _index(expand(path, "path"), image, label)}
    if test_path:
        parts["test"] = _index(expand(test_path, "test_path"), image, label)
    if len({labels is None for _, labels in parts.values()}) == 2:
        raise ArgumentError("path and test_path must both have labels, or neither")
    top = classes
    if not classes and parts["train"][1] is not None:
        tops = (checked_labels(labels, len(members))[1] for members, labels in parts.values())
        top = max(tops)
    members, labels = parts[split] if test_path else parts["train"]
    if not test_path:
        places = held_out(len(members), split)
        members = members[places.numpy()]
        labels = labels[places] if labels is not None else None
    if not len(members):
        raise ArgumentError(f"path={path!r} has fewer than 10 samples; give a test_path")
    return ImageData(members, frame, labels, classes=top, broken=broken)


def expand(path: str, option: str) -> list[str]:
    """The files of a pattern: braces {000..146} and {a,b}, then wildcards; in order of name."""
    found: list[str] = []
    for one in _braces(str(Path(path).expanduser()) if path else ""):
        wild = sorted(glob.glob(one)) if glob.has_magic(one) else [one]
        missing = [file for file in wild if not os.path.isfile(file)]
        if missing or not wild:
            raise ArgumentError(
                f"{option}={path!r}: there is no file {(missing or [one])[0]!r}; give shards such "
                "as --data_options.path 'data/train-{000..146}.tar'"
            )
        found += wild
    return found


def _braces(pattern: str) -> Iterator[str]:
    """The strings of a pattern with {a,b} and {000..009}, as a shell has them; none nested."""
    match = re.search(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    inner = match[1]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inner)
    options = inner.split(",")
    if span:
        first, last = int(span[1]), int(span[2])
        width = len(span[1]) if span[1].startswith("0") else 0
        step = 1 if last >= first else -1
        options = [str(k).zfill(width) for k in range(first, last + step, step)]
    for option in options:
        for rest in _braces(pattern[match.end() :]):
            yield pattern[: match.start()] + option + rest


@dataclass
class Sample:
    """One key of a shard while it is read: where its image is, and its label."""

    key: str
    image: tarfile.TarInfo | None = None
    label: int | None = None


def _index(shards: list[str], image: str, label: str) -> tuple[Members, Tensor | None]:
    """Where the images of the shards are, and their labels."""
    table: list[tuple[int, int, int, bytes]] = []
    labels: list[int | None] = []
    for number, shard in enumerate(shards):
        for sample in _samples(shard, image, label):
            if sample.image is None:
                wanted = f".{image}" if image else "image"
                raise ArgumentError(f"{shard}: sample {sample.key} has no {wanted}")
            member = sample.image
            table.append((number, member.offset_data, member.size, os.fsencode(member.name)))
            labels.append(sample.label)
    if not table:
        raise ArgumentError(f"{shards[0]} and {len(shards) - 1} more shards hold no sample")
    shard_of, offset, size, names = zip(*table, strict=True)
    members = Members(shards, *map(np.array, (shard_of, offset, size, names)))
    if label == "none" or (label == "auto" and all(found is None for found in labels)):
        return members, None
    for k, found in enumerate(labels):
        if found is None:
            raise ArgumentError(
                f"{members.name(k)} has no label ({label}), and others have one; add it, or take "
                "label=none"
            )
    return members, torch.tensor(labels)


def _samples(shard: str, image: str, label: str) -> Iterator[Sample]:
    """The samples of a shard: members that follow each other with one key, as webdataset's own."""
    sources = {"none": (), "cls": ("cls",), "auto": ("cls", "json")}.get(label, ("json",))
    sample: Sample | None = None
    for tar, member in _members(shard):
        match = re.match(r"((?:.*/)?[^./][^./]*)\.([^/]*)$", member.name)
        if match is None or match[1].rsplit("/", 1)[-1].startswith("__"):
            continue
        key, extension = match[1], match[2].lower()
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = Sample(key)
        last = extension.rsplit(".", 1)[-1]
        if extension == image.lower() or (not image and f".{last}" in SUFFIXES):
            if sample.image is not None:
                raise ArgumentError(
                    f"{shard}: sample {key} has two images, {sample.image.name} and {member.name}; "
                    "say which with the option image, such as image=jpg"
                )
            sample.image = member
        elif extension in sources and (content := tar.extractfile(member)):
            found = _label(shard, member.name, content.read(), label)
            if sample.label is None or extension == "cls":
                sample.label = found
    if sample is not None:
        yield sample


def _label(shard: str, name: str, content: bytes, label: str) -> int | None:
    """The label in a .cls or .json; None where it holds none."""
    found: Any = content.strip()
    if name.lower().endswith(".cls"):
        found = int(found) if found.isdigit() else found.decode(errors="replace")
    else:
        try:
            fields = json.loads(found)
        except ValueError as error:
            raise ArgumentError(f"{shard}: {name} is no JSON ({error})") from error
        field = "label" if label == "auto" else label
        if not isinstance(fields, dict) or field not in fields:
            return None
        found = fields[field]
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        raise ArgumentError(
            f"{shard}: {name}: the label {found!r} must be a whole number >= 0; or take label=none"
        )
    return found


def _members(shard: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The files in a tar, each with the open tar; an error where it is compressed or cut off."""
    with open(shard, "rb") as stream:
        start = stream.read(8)
        for magic, remedy in COMPRESSED.items():
            if start.startswith(magic):
                raise ArgumentError(
                    f"{shard} is compressed, and so cannot be read at any place; unpack it with "
                    f"{remedy} (the images in it are compressed already)"
                )
        stream.seek(0)
        try:
            with tarfile.open(fileobj=stream, mode="r:", name=shard) as tar:
                while (member := tar.next()) is not None:
                    if member.isreg():
                        yield tar, member
                stream.seek(tar.offset)  # tarfile takes a damaged header for the end, in silence
                if stream.read(BLOCK) != bytes(BLOCK):
                    raise tarfile.ReadError("a header is damaged, or the mark of the end missing")
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ArgumentError(
                f"{shard} is damaged or cut off ({error}); fetch or make it again"
            ) from error


@hookimpl
def sdeflow_datasets() -> Mapping[str, Factory]:
    return {"webdataset": webdataset}
