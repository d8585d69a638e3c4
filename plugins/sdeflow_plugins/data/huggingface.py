"""Images of a Hugging Face data set, local or of the hub (extra `data`)."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdeflow.errors import ArgumentError, PluginError, one_of
from sdeflow.plugins import Factory, hookimpl

from . import checked_labels, checked_split, held_out
from .images import Broken, Color, Crop, Frame, ImageData
from .tree import TEST_NAMES


class Rows:
    """The image column of a table, its images not yet decoded.

    table: a `datasets.Dataset`; column: the name of the images in it; title: for errors.
    """

    def __init__(self, table: Any, column: str, title: str) -> None:
        self.table, self.column, self.title = table, column, title

    def __len__(self) -> int:
        return len(self.table)

    def name(self, k: int) -> str:
        """Table and row."""
        return f"{self.title}: row {k}"

    def file(self, k: int) -> str | io.BytesIO:
        """The bytes of row k, or the path of its file."""
        found = self.table[k][self.column]
        if found is None:
            raise ValueError("the row has no image")
        return io.BytesIO(found["bytes"]) if found["bytes"] is not None else found["path"]


def huggingface(
    split: str = "train",
    path: str = "",
    name: str = "",
    revision: str = "",
    image: str = "",
    label: str = "auto",
    size: int = 32,
    color: Color = "rgb",
    crop: Crop = "center",
    crops: int = 0,
    flip: bool = True,
    broken: Broken = "refuse",
) -> ImageData:
    """Images of a Hugging Face data set: a local folder or a name of the hub; needs sdeflow[data].

    Args:
        split: "train", or "test", which is the split test, validation, val or valid of the data
            set; where it has train alone, every tenth row of it is held out.
        path: a folder written by save_to_disk, a folder of .parquet files or of images (an
            "imagefolder"), or a name of the hub such as ylecun/mnist.
        name: the configuration, for those that have several.
        revision: of a data set of the hub: a tag or commit, which pins what is read.
        image: the column of the images; "" is the only one there is.
        label: the column of the labels; "none"; "auto" is the only ClassLabel column, if any.
        size, color, crop, crops, flip, broken: as of the data set folder.
    """
    checked_split(split)
    frame = Frame.of(split, size, color, crop, crops, flip)
    parts = _load(path, name, revision)
    if "train" not in parts:
        raise ArgumentError(f"path={path!r} has no split train, but {', '.join(parts)}")
    tests = [part for part in TEST_NAMES if part in parts]
    whole = parts[tests[0] if tests and split == "test" else "train"]
    column = _image_column(whole, image, path)
    labels, names = _labels(whole, label, path)
    top = len(names)
    if labels is not None and not names:
        every = [_labels(parts[part], label, path)[0] for part in ["train", *tests[:1]]]
        top = max(checked_labels(one, len(one))[1] for one in every if one is not None)
    if not tests:
        places = held_out(len(whole), split)
        whole = whole.select(places.numpy())
        labels = labels[places] if labels is not None else None
    if not len(whole):
        raise ArgumentError(f"path={path!r} has no row for split={split!r}")
    from datasets import Image

    table = whole.select_columns([column]).cast_column(column, Image(decode=False))
    rows = Rows(table, column, f"{path} ({split})")
    return ImageData(rows, frame, labels, names, top, broken)


def _load(path: str, name: str, revision: str) -> dict[str, Any]:
    """The tables of a data set by split."""
    if not path:
        raise ArgumentError(
            "path='' must be a folder or a name of the hub: --data_options.path ylecun/mnist"
        )
    try:
        import datasets
    except ImportError as error:
        raise PluginError(
            f"data set 'huggingface' needs datasets ({error}); pip install 'sdeflow[data]'"
        ) from error
    root = Path(path).expanduser()
    try:
        if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
            found = datasets.load_from_disk(str(root))
        else:
            where = str(root) if root.exists() else path
            found = datasets.load_dataset(where, name or None, revision=revision or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ArgumentError(
            f"path={path!r} cannot be loaded ({type(error).__name__}: {error}); give a folder "
            "written by save_to_disk, one of .parquet files or images, or a name of the hub"
        ) from error
    return dict(found) if isinstance(found, Mapping) else {"train": found}


def _image_column(table: Any, image: str, path: str) -> str:
    from datasets import Image

    columns = [name for name, feature in table.features.items() if isinstance(feature, Image)]
    if image:
        return one_of("image", image, columns)
    if len(columns) != 1:
        raise ArgumentError(
            f"path={path!r} has {len(columns)} columns of images among "
            f"{', '.join(table.features)}; name one with image; for numbers take arrays"
        )
    return columns[0]


def _labels(table: Any, label: str, path: str) -> tuple[Tensor | None, list[str]]:
    """The labels, and the names of the classes where they are known."""
    from datasets import ClassLabel

    features = table.features
    named = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if label == "auto" and len(named) > 1:
        raise ArgumentError(f"path={path!r}: say which label: {', '.join(named)}, or none")
    if label == "none" or (label == "auto" and not named):
        return None, []
    column = named[0] if label == "auto" else one_of("label", label, ["auto", "none", *features])
    found = np.asarray(table.select_columns([column]).with_format("numpy")[:][column])
    if found.dtype.kind not in "iufb":
        raise ArgumentError(
            f"path={path!r}: column {column} holds {features[column]}, and labels must be whole "
            "numbers; number the classes with class_encode_column"
        )
    feature = features[column]
    names = list(feature.names) if isinstance(feature, ClassLabel) else []
    title = f"labels of {path}, {column},"
    return checked_labels(torch.from_numpy(found), len(table), len(names), title)[0], names


@hookimpl
def sdeflow_datasets() -> Mapping[str, Factory]:
    return {"huggingface": huggingface}
