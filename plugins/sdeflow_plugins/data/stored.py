"""Arrays in files, read without pickle: .npy and .safetensors mapped into memory, .npz loaded."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdeflow.errors import ArgumentError, PluginError, did_you_mean

ENDINGS = (".npy", ".npz", ".safetensors")
Array = np.ndarray | Tensor


class Stored:
    """One array of a file, opened when it is first read.

    Copies of it in worker processes open the file for themselves.

    path: the file. key: the array's name in it; "" for a .npy.
    """

    def __init__(self, path: Path, key: str = "") -> None:
        self.path, self.key = path, key
        self._array: Array | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_array": None}

    @property
    def array(self) -> Array:
        """The array."""
        if self._array is None:
            self._array = _load(self.path, self.key)
        return self._array

    @property
    def kind(self) -> str:
        """The data type's name, such as uint8 or bfloat16."""
        return kind_of(self.array)

    def take(self, rows: Tensor) -> Tensor:
        """Those rows, in float32."""
        array = self.array
        if isinstance(array, Tensor):
            return array[rows].float()
        return torch.from_numpy(np.asarray(array[rows.numpy()], dtype=np.float32))

    def __str__(self) -> str:
        what = f"{self.kind} {tuple(self.array.shape)}"
        return f"{self.path}{f': {self.key}' if self.key else ''} ({what})"


class Held:
    """An array in memory, with the manners of a `Stored` one."""

    def __init__(self, array: Tensor) -> None:
        self.array = array
        self.kind = kind_of(array)

    def take(self, rows: Tensor) -> Tensor:
        """Those rows, in float32."""
        return self.array[rows].float()


def kind_of(array: Array) -> str:
    """The name of the data type: uint8, float32, bfloat16."""
    if isinstance(array, Tensor):
        return str(array.dtype).removeprefix("torch.")
    return array.dtype.name


def existing_file(path: str, name: str, endings: tuple[str, ...] = ENDINGS) -> Path:
    """The file at `path`, which has one of the endings; name: of the option, for errors."""
    file = Path(path).expanduser()
    if not path or not file.is_file():
        raise ArgumentError(
            f"{name}={path!r} must be a file with one of the endings {' '.join(endings)}, such as "
            f"--data_options.{name} ~/data/x{endings[0]}"
        )
    if file.suffix.lower() not in endings:
        raise ArgumentError(f"{name}={path!r} must have one of the endings {' '.join(endings)}")
    return file


def keys(path: Path) -> list[str]:
    """The names of the arrays in a file; [""] for a .npy."""
    if path.suffix.lower() == ".npy":
        return [""]
    try:
        if path.suffix.lower() == ".npz":
            with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                return list(arrays.files)
        from safetensors import safe_open

        with safe_open(path, framework="pt") as arrays:
            return sorted(arrays.keys())
    except Exception as error:
        raise _unreadable(path, "", error) from error


def pick(path: Path, key: str, option: str, other: str = "") -> Stored:
    """The array called `key` of a file; "" picks the only one there is beside `other`.

    option: the name of the option that says which, for errors.
    """
    names = keys(path)
    if names == [""]:
        if key:
            raise ArgumentError(
                f"{option}={key!r}: {path} holds one array without a name; leave {option} out, and "
                "give the labels of a .npy in a file of their own, as label_path"
            )
        return Stored(path)
    if key:
        if key not in names:
            raise ArgumentError(
                f"{option}={key!r}: {path} has no such array{did_you_mean(key, names)}"
            )
        return Stored(path, key)
    left = [name for name in names if name != other]
    if len(left) != 1:
        listed = "; ".join(f"{name} {_form(path, name)}" for name in left)
        raise ArgumentError(
            f"{path} holds {len(left)} arrays ({listed or 'none'}); say which one to read with the "
            f"option {option}"
        )
    return Stored(path, left[0])


def _form(path: Path, key: str) -> str:
    try:
        array = _load(path, key)
    except ArgumentError:
        return "unreadable"
    return f"{kind_of(array)} {tuple(array.shape)}"


def _load(path: Path, key: str) -> Array:
    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        if path.suffix.lower() == ".npz":
            with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                return arrays[key]
        from safetensors import safe_open

        with safe_open(path, framework="pt") as arrays:
            return arrays.get_tensor(key)
    except Exception as error:
        raise _unreadable(path, key, error) from error


def _unreadable(path: Path, key: str, error: Exception) -> Exception:
    """What to raise instead of `error`."""
    if isinstance(error, ImportError):
        return PluginError(f"{path} needs safetensors ({error}); pip install 'sdeflow[images]'")
    damage = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, pickle.UnpicklingError)
    if not isinstance(error, damage) and type(error).__name__ != "SafetensorError":
        return error
    where = f"{path}{f': {key}' if key else ''}"
    if any(word in str(error).lower() for word in ("pickle", "object")):
        return ArgumentError(
            f"{where} holds Python objects, which are pickled and never loaded, for a pickle may "
            "run any code; save numbers: np.save(path, np.stack(rows).astype('float32'))"
        )
    return ArgumentError(
        f"{where} cannot be read ({type(error).__name__}: {error}); it is damaged, cut off, or not "
        f"a {path.suffix} file"
    )
