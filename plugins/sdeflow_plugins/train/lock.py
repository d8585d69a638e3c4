"""One process at a time: a lock on a folder that the kernel releases when its holder dies."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from sdeflow.errors import SdeflowError

_held: set[int] = set()
"""Descriptors of this process's locks. A fork (a worker that reads data) must not hold them."""


class LockedError(SdeflowError, RuntimeError):
    """Another process is at work in the folder."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, its file `.lock`; a second holder is refused at once.

    The file stays; a lock is a property of the open file (flock), so that none outlives a process
    that is killed. Systems without flock (Windows) go unguarded.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            raise LockedError(
                f"run: {folder} is being trained by another process ({holder or 'unknown'}); wait "
                "for it, stop it, or choose another folder"
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        _held.add(descriptor)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _let_go() -> None:
    """In a forked child: close what the parent holds, which does not release it there."""
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
