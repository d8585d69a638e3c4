"""CelebA, from a local folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sdeflow.errors import ArgumentError, one_of
from sdeflow.plugins import Factory, hookimpl

from .images import Broken, Color, Crop, Frame, ImageData
from .tree import Files, existing_folder

PARTITION, ATTRIBUTES = "list_eval_partition.txt", "list_attr_celeba.txt"
IMAGES, PEOPLE = "img_align_celeba", "identity_CelebA.txt"


def celeba(
    split: str = "train",
    path: str = "",
    size: int = 64,
    color: Color = "rgb",
    crop: Crop = "center",
    crops: int = 0,
    flip: bool = True,
    labels: str = "none",
    broken: Broken = "refuse",
) -> ImageData:
    """CelebA from a local folder with img_align_celeba/*.jpg and its lists: faces, 178 x 218.

    list_eval_partition.txt says which of the 202,599 images are "train" (162,770) and which "test"
    (19,962); its validation images are in neither. Source: Liu et al. (2015).

    Args:
        split: "train" or "test".
        path: the folder that holds img_align_celeba and list_eval_partition.txt.
        labels: "none"; an attribute of list_attr_celeba.txt such as "Smiling" (class 1 has it,
            class 0 has not); or "identity", the person, of identity_CelebA.txt.
        size, color, crop, crops, flip, broken: as of the data set folder.
    """
    frame = Frame.of(split, size, color, crop, crops, flip)
    root = existing_folder(path, "CelebA file")
    which = "0" if split == "train" else "2"
    names = [name for name, part in _table(root / PARTITION, 2) if part == which]
    if not (root / IMAGES).is_dir() or not names:
        raise ArgumentError(
            f"path={path!r} must hold the folder {IMAGES} and a {PARTITION} with images of "
            f"split={split!r} (0 is train, 2 is test); it does not"
        )
    of_image, class_names = _labels(root, labels, names)
    files = Files(root / IMAGES, names)
    return ImageData(files, frame, of_image, class_names, broken=broken)


def _labels(root: Path, labels: str, names: list[str]) -> tuple[Tensor | None, list[str]]:
    """The label of each image, and the names of the classes."""
    if labels == "none":
        return None, []
    if labels == "identity":
        people = dict(_table(root / PEOPLE, 2))
        known = sorted(set(people.values()), key=int)
        number = {person: k for k, person in enumerate(known)}
        return torch.tensor([number[_entry(people, n, PEOPLE)] for n in names]), known
    head = _table(root / ATTRIBUTES, 0)[1]
    column = head.index(one_of("labels", labels, ["none", "identity", *head])) + 1
    signs = {row[0]: row[column] for row in _table(root / ATTRIBUTES, len(head) + 1, skip=2)}
    found = torch.tensor([int(_entry(signs, name, ATTRIBUTES) == "1") for name in names])
    return found, [f"not {labels}", labels]


def _table(file: Path, columns: int, skip: int = 0) -> list[list[str]]:
    """The words of each line after the first `skip`; 0 columns takes any number of them."""
    if not file.is_file():
        raise ArgumentError(f"path: {file} is missing; it comes with CelebA, beside the images")
    rows = [line.split() for line in file.read_text(encoding="utf-8").splitlines()[skip:]]
    for number, row in enumerate(rows, skip + 1):
        if columns and row and len(row) != columns:
            raise ArgumentError(f"{file}, line {number}: {len(row)} columns, not {columns}")
    return [row for row in rows if row]


def _entry(table: dict[str, str], name: str, file: str) -> str:
    if name not in table:
        raise ArgumentError(f"{file} has no line for {name}, which {PARTITION} lists")
    return table[name]


@hookimpl
def sdeflow_datasets() -> Mapping[str, Factory]:
    return {"celeba": celeba}
