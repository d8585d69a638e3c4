"""Files that are whole or not there at all, whatever moment the process or the machine stops at."""

from __future__ import annotations

import os
from pathlib import Path


def replace(path: Path, data: bytes) -> None:
    """Put a file in place in one go: temporary name, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(folder: Path) -> None:
    """Make renames in a folder last, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def free_name(path: Path, suffix: str = "") -> Path:
    """The path with the suffix, or with the first of .1, .2, ... that no file has."""
    name, number = path.with_name(path.name + suffix), 0
    while name.exists() or not suffix and not number:
        number += 1
        name = path.with_name(f"{path.name}{suffix}.{number}")
    return name


def replace_text(path: Path, text: str) -> Path | None:
    """Put a text file in place; one that held anything else lives on as name.N, returned."""
    data, aside = text.encode(), None
    if path.is_file():
        old = path.read_bytes()
        if old == data:
            return None
        aside = free_name(path)
        replace(aside, old)
    replace(path, data)
    return aside
