"""What test_distributed.py runs under torchrun: every check of one job, in one start of processes.

python -m torch.distributed.run ... tests/ranks_at_work.py FOLDER TASK...
Rank 0 writes what each task gives as FOLDER/TASK.safetensors.
"""

import dataclasses
import faulthandler
import os
import sys
import time
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from sdeflow_plugins.generate.sampler import Sampler
from sdeflow_plugins.generate.shards import sample_seeds
from sdeflow_plugins.ranks import RankError, Ranks
from sdeflow_plugins.train import checkpoint, loop, sharded
from sdeflow_plugins.train.engine import close, describe, distribute, make_fabric
from sdeflow_plugins.train.fsdp import whole
from sdeflow_plugins.train.loop import training
from sdeflow_plugins.train.order import Noise, key
from sdeflow_plugins.train.recipe import Recipe
from sdeflow_plugins.train.session import train_run
from sdeflow_plugins.train.state import State

STEPS, STOP = 20, 8
RECIPE = Recipe(
    data="moons",
    data_options={"n": 256},
    network="mlp",
    network_options={"width": 15, "depth": 1},  # rows that two ranks cannot share evenly
    steps=STEPS,
    batch_size=32,
    warmup=2,
    device="cpu",
)
FSDP = dataclasses.replace(RECIPE, strategy="fsdp")
SESSION = dataclasses.replace(
    RECIPE, schedule="constant", log_every=4, save_every=8, preview_every=STEPS
)
SEEDS = list(range(10, 40))


def begin(recipe):
    """(data set, state, fabric) before the first step."""
    dataset, fabric = recipe.make_dataset(), make_fabric(recipe)
    state = State.fresh(recipe, dataset.shape, fabric.device)
    distribute(state, fabric)
    return dataset, state, fabric


def train(recipe, manifest=None, stop=STEPS):
    """(state, losses) from the beginning or a checkpoint to a step."""
    dataset, state, fabric = begin(recipe)
    if manifest:
        state.unpack(*sharded.read(manifest, state))
    losses = []
    for record in training(recipe, dataset, state, fabric):
        losses.append([record.loss, record.grad_norm])
        if record.step == stop:
            break
    return state, torch.tensor(losses)


def result(state, losses):
    """All tensors of a state put together, and the losses."""
    return {**whole(state.pack()[0]), "losses": losses}


def save(state, folder):
    """A checkpoint: the shards of all ranks, or rank 0's file."""
    facts = {**state.pack()[1], "note": "ours"}
    if sharded.is_sharded(state):
        return sharded.write(folder, state.step, state.pack()[0], facts)
    if torch.distributed.get_rank() == 0:
        checkpoint.write(folder, state.step, state.pack()[0], facts)
    torch.distributed.barrier()
    return checkpoint.latest(folder)


# ---- the tasks: each takes the folder of the job


def straight(folder, recipe=RECIPE):
    return result(*train(recipe))


def resumed(folder, recipe=RECIPE, name="whole"):
    state, first = train(recipe, stop=STOP)
    manifest = save(state, folder / name)
    state, last = train(recipe, manifest)
    assert state.step == STEPS
    return result(state, torch.cat([first, last]))


def accumulated(folder):
    return result(*train(dataclasses.replace(RECIPE, accumulate=2)))


def fsdp(folder):
    return straight(folder, FSDP)


def fsdp_resumed(folder):
    return resumed(folder, FSDP, "shards")


def fsdp_from_ddp(folder):
    """The checkpoint that `resumed` wrote, taken up with shards."""
    return result(*train(FSDP, checkpoint.latest(folder / "whole")))


def ddp_from_fsdp(folder):
    """The checkpoint that `fsdp_resumed` wrote, taken up without shards."""
    return result(*train(RECIPE, checkpoint.latest(folder / "shards")))


def local_noise(folder):
    """The planted fault: each rank draws noise of its own instead of its rows of the batch's."""

    def draw(recipe, sde, shape, generator):
        own = generator.manual_seed(key(generator.initial_seed(), torch.distributed.get_rank()))
        return Noise.draw(recipe, sde, shape, own)

    class Local(Noise):
        pass

    Local.draw = staticmethod(draw)
    loop.Noise, kept = Local, loop.Noise
    try:
        return straight(folder)
    finally:
        loop.Noise = kept


def samples(folder):
    denoiser = RECIPE.make_denoiser(RECIPE.make_network((2,)).eval())
    sampler = Sampler("euler_maruyama", eta=1.0)

    def draw(seeds, places):
        return sampler.run(denoiser, (len(seeds), 2), 5, seeds)

    with sample_seeds(draw, SEEDS, 4, folder / "samples", {}) as found:
        return {} if found is None else {"x": found.x}


def session(folder, recipe=SESSION, name="run"):
    """A whole run in a folder, stopped at step 8 by its length and gone on with."""
    train_run(folder / name, dataclasses.replace(recipe, steps=STOP), quiet=True)
    train_run(folder / name, recipe, resume=True, quiet=True)
    return {"done": torch.ones(1)}


def fsdp_session(folder):
    return session(folder, dataclasses.replace(SESSION, strategy="fsdp"), "fsdp_run")


def refused(folder):
    """A run that rank 0 alone refuses, for the folder holds one; the others must not wait."""
    train_run(folder / "run", SESSION, quiet=True)
    train_run(folder / "run", SESSION, quiet=True)


def disagree(folder):
    """Ranks with different recipes; then a rank that never comes."""
    rank = Ranks.here().rank
    try:
        make_fabric(dataclasses.replace(RECIPE, seed=rank))
        raise AssertionError("ranks with different seeds went on")
    except RankError as error:
        assert "recipe.seed: rank 0 0, rank 1 1" in str(error), error
    if rank == 0:
        try:
            Ranks.here().agree({}, patience=0.5)
            raise AssertionError("rank 0 went on alone")
        except RankError as error:
            assert "no word from ranks 1 for 0.5 s" in str(error), error
    return {"done": torch.ones(1)}


def main(folder, *tasks):
    faulthandler.dump_traceback_later(140, exit=True)  # nothing hangs
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    fabric = make_fabric(RECIPE)
    lead = fabric.is_global_zero
    if lead:
        print(describe(fabric))
    for task in tasks:
        start = time.monotonic()
        tensors = globals()[task](Path(folder))
        if lead:
            save_file(tensors, Path(folder) / f"{task}.safetensors")
            print(f"{task}: {time.monotonic() - start:.1f} s")
    close(fabric)


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # gloo's threads and the end of the interpreter do not always get on
