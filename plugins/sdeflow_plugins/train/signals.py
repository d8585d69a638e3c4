"""Ctrl-C and SIGTERM in a long run: the step in hand is finished first, on all ranks the same."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lightning_fabric import Fabric

CAUGHT = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """Notes SIGINT and SIGTERM within a `with` block, in the main thread; elsewhere it is blind.

    `stop()` says, after a step, whether to end there; over several ranks they agree, so that all
    end at the same step. `leave()` raises what the process ends with: KeyboardInterrupt, which is
    status 130, or SystemExit(143). A second Ctrl-C interrupts at once.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.caught: signal.Signals | None = None
        self.world, self.pid = fabric.world_size, os.getpid()
        self.group: Any = None
        self.old: dict[signal.Signals, Any] = {}
        if self.world > 1:  # of the CPU: asking costs no wait for a GPU
            self.group = torch.distributed.new_group(backend="gloo")

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self.old = {number: signal.signal(number, self._note) for number in CAUGHT}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self.old.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self.old = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.pid:  # a worker that reads data; its parent tells it when to end
            return
        if self.caught is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = self.caught or signal.Signals(number)
        again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        text = f"\n{self.caught.name}: finishing the step, then a checkpoint{again}\n"
        os.write(2, text.encode())  # the stream itself may be in use just now

    def stop(self) -> bool:
        """Whether a signal has come, to this rank or another."""
        if self.world == 1:
            return self.caught is not None
        number = torch.tensor(int(self.caught or 0))
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=self.group)
        if number:
            self.caught = signal.Signals(int(number))
        return bool(number)

    def leave(self) -> None:
        """End the process as the signal asks; nothing if none has come."""
        if self.caught == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        if self.caught is not None:
            raise KeyboardInterrupt
