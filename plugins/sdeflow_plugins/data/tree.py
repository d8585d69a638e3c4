"""Folders of files: which belong to a split, and which class folder each lies in."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sdeflow.errors import ArgumentError, one_of

from . import checked_split, held_out

Labels = Literal["auto", "folders", "none"]
TEST_NAMES = ("test", "val", "validation", "valid")


class Files:
    """Files below a folder, in order. A million paths are one array, which worker processes share
    without copying it page by page."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root = str(root)
        self.names = np.array([os.fsencode(name) for name in names])

    def __len__(self) -> int:
        return len(self.names)

    def file(self, k: int) -> str:
        """The path of file k."""
        return os.path.join(self.root, os.fsdecode(self.names[k]))

    name = file


def read_tree(
    path: str,
    split: str,
    labels: str,
    suffixes: Sequence[str],
    noun: str,
    parts: tuple[str, str] | None = None,
) -> tuple[Files, Tensor | None, list[str]]:
    """The files of a split in order of name, the class of each (or None), and the class names.

    The splits are the subfolders `train` and `test` (or val, validation, valid), where both are
    there; otherwise every tenth file is held out as "test". A class is the first folder below that.
    Both splits number the classes in order of name, over both. Hidden files are left out.

    labels: "folders"; "none"; "auto": folders, where there are two or more and no file beside them.
    suffixes: of the files, lower case. noun: what they are, for errors. parts: the names of the
    two subfolders, which must then be there.
    """
    checked_split(split)
    one_of("labels", labels, ("auto", "folders", "none"))
    root = existing_folder(path, noun)
    train, test = _parts(root, parts)
    pools = [train] if test is None else [train, test]
    found = {pool: list(files_below(pool, suffixes)) for pool in pools}
    pool = pools[-1] if split == "test" else train
    names = found[pool]
    if test is None:
        names = [names[k] for k in held_out(len(names), split).tolist()]
    if not names:
        raise ArgumentError(
            f"path={path!r} holds no {noun} for split={split!r}; put at least 10 files there with "
            f"one of the endings {' '.join(sorted(suffixes))}, or subfolders train and test"
        )
    classes = class_names(found, labels)
    if not classes:
        return Files(pool, names), None, []
    number = {name: k for k, name in enumerate(classes)}
    of_file = [number[name.split("/", 1)[0]] for name in names]
    return Files(pool, names), torch.tensor(of_file), classes


def existing_folder(path: str, noun: str) -> Path:
    """The folder at `path`."""
    root = Path(path).expanduser()
    if not path or not root.is_dir():
        what = f"; it is a file: give the folder it is in, {str(root.parent)!r}"
        raise ArgumentError(
            f"path={path!r} must be a folder with {noun}s, such as --data_options.path ~/data"
            f"{what if path and root.is_file() else ''}"
        )
    return root


def _parts(root: Path, parts: tuple[str, str] | None) -> tuple[Path, Path | None]:
    """The folders of training and test files; None where there is one folder for both."""
    if parts is not None:
        for part in parts:
            if not (root / part).is_dir():
                raise ArgumentError(f"path={str(root)!r} must hold a folder {part!r}; it has none")
        return root / parts[0], root / parts[1]
    if not (root / "train").is_dir():
        return root, None
    tests = [root / name for name in TEST_NAMES if (root / name).is_dir()]
    if tests:
        return root / "train", tests[0]
    alone = [entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != "."]
    return (root / "train" if alone == ["train"] else root), None


def files_below(root: Path, suffixes: Sequence[str]) -> Iterator[str]:
    """The paths below `root`, relative to it, with "/", ordered by name folder by folder.

    Links are followed; a folder that two of them lead to counts once, so that no circle holds.
    """
    seen = {os.path.realpath(root)}

    def walk(folder: str, prefix: str) -> Iterator[str]:
        try:
            with os.scandir(folder) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise ArgumentError(f"path: {folder} cannot be listed ({error.strerror})") from error
        for entry in inside:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                real = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                if real not in seen:
                    seen.add(real)
                    yield from walk(entry.path, f"{prefix}{entry.name}/")
            elif os.path.splitext(entry.name)[1].lower() in suffixes:
                yield prefix + entry.name

    return walk(os.path.realpath(root), "")


def class_names(found: dict[Path, list[str]], labels: str) -> list[str]:
    """The names of the class folders over all pools; none where the files are unlabelled."""
    if labels == "none":
        return []
    classes = sorted({n.split("/", 1)[0] for names in found.values() for n in names if "/" in n})
    loose = {pool: next((n for n in names if "/" not in n), "") for pool, names in found.items()}
    first = next((pool / name for pool, name in loose.items() if name), None)
    sorted_in = [pool for pool, name in loose.items() if not name and found[pool]]
    if first is None:
        return classes if len(classes) > 1 or labels == "folders" else []
    if labels == "folders" or (len(classes) > 1 and sorted_in):
        raise ArgumentError(
            f"path: {first} lies in no class folder; move it into one, or take labels=none"
        )
    return []
