"""A server that forks training runs and kills them: the import of torch is paid once, not 50 times.

It reads a line of JSON for each run, `{"folder", "delay", "line", "fault"}`, and answers with one:
how the run ended, whether it was saving then, and the last step whose checkpoint stood.
"""

import json
import mmap
import os
import signal
import struct
import sys
import threading
import time

import torch
from sdeflow_plugins.train import checkpoint, files, run, session
from sdeflow_plugins.train.engine import make_fabric
from sdeflow_plugins.train.recipe import Recipe
from sdeflow_plugins.train.state import State

RECIPE = Recipe(
    data="moons",
    data_options={"n": 64},
    network="mlp",
    network_options={"width": 8, "depth": 1},
    steps=15,
    batch_size=8,
    warmup=2,
    device="cpu",
    log_every=4,
    save_every=3,  # so that a line of metrics.csv spans two checkpoints
    preview_every=1000,
)
SAVING = "?ii"
"""What a run tells while it lives: whether it saves, the last step saved, lines of saving code."""


def serve():
    """Answer until the input ends."""
    torch.set_num_threads(1)
    make_fabric(RECIPE)
    State.fresh(RECIPE, RECIPE.make_dataset().shape, torch.device("cpu"))
    assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1, "unsafe to fork"
    for line in sys.stdin:
        print(json.dumps(live(**json.loads(line))), flush=True)


def live(folder, delay=None, line=None, fault=""):
    """One run in a fork, killed after `delay` seconds, or at a line of the code that saves."""
    told = mmap.mmap(-1, struct.calcsize(SAVING))
    start = time.monotonic()
    child = os.fork()
    if not child:
        status = 1
        try:
            for stream in (0, 1):
                os.dup2(os.open(os.devnull, os.O_RDWR), stream)
            train(folder, line, fault, told)
            status = 0
        finally:
            os._exit(status)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    saving, step, lines = struct.unpack(SAVING, told[:])
    return {
        "status": status,
        "saving": saving,
        "step": step,
        "lines": lines,
        "seconds": time.monotonic() - start,
    }


def train(folder, line, fault, told):
    """Train in the folder, or go on there; SIGKILL at the line-th line of the code that saves."""
    session.Watch.draw = session.write_card = lambda *_: None  # else most of the time is theirs
    step = lines = 0

    def tell(saving):
        told[:] = struct.pack(SAVING, saving, step, lines)

    def trace(frame, event, _):
        nonlocal lines
        if (frame.f_code.co_filename, frame.f_code.co_name) not in TRACED:
            return None
        if event == "line":
            lines += 1
            if lines == line:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def save(self, state, facts):
        nonlocal step
        tell(True)
        sys.settrace(trace)
        FAULTS[fault](self, state, facts)
        sys.settrace(None)
        step = state.step
        tell(False)

    session.Run.save = save
    session.train_run(folder, RECIPE, resume="auto", quiet=True)


TRACED = {
    *((files.__file__, name) for name in ("replace", "replace_text", "sync")),
    *((checkpoint.__file__, name) for name in ("write", "write_manifest", "make_way", "prune")),
    *((checkpoint.__file__, name) for name in ("sweep", "set_aside")),
    *((run.__file__, name) for name in ("save", "tidy")),
    *((__file__, name) for name in ("replace_in_place", "old_ones_first")),
}
"""The code that touches files in a save."""
sound = run.Run.save


def in_place(self, state, facts):
    """A planted fault: manifests are written under their own names, bit by bit."""
    checkpoint.replace = replace_in_place
    sound(self, state, facts)


def replace_in_place(path, data):
    if path.suffix != ".json":
        files.replace(path, data)
        return
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(data), 100):
            file.write(data[start : start + 100])


def old_ones_first(self, state, facts):
    """A planted fault: the old checkpoints are removed before the new one is written."""
    for manifest in reversed(checkpoint.manifests(self.checkpoints)):
        manifest.unlink()
        manifest.with_suffix(".safetensors").unlink()
    sound(self, state, facts)


FAULTS = {"": sound, "in_place": in_place, "old_ones_first": old_ones_first}

if __name__ == "__main__":
    serve()
