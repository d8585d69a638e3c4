"""The training loops and samplers that train.py compares: ours and those of two peers.

A competitor is built from a case and gives `run(steps)`: train that many steps, each on a batch of
the same images in memory. What is timed in it: reading and collating the batch, noise, loss,
backward, clipping of the gradient's norm to 1, optimizer, moving average, and the loop's own
progress bar (written to nowhere).

- ours: `sdeflow_plugins.train.loop.training`, under a bar as in `sdeflow train`.
- diffusers: its tutorial's loop in plain torch, without accelerate: DDPMScheduler.add_noise,
  AdamW, the mean squared error of the noise, EMAModel, the bar with loss and rate at each step.
- ddpm-pytorch: `Trainer.train` of denoising-diffusion-pytorch itself, its data set replaced by the
  images in memory, read in this process as by the other two. It averages the weights at each tenth
  step only, as it does by default.

denoising-diffusion-pytorch imports torchvision, which only its reading and writing of image files
uses; empty modules stand in for it here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import os
import sys
import tempfile
import types
from dataclasses import dataclass
from functools import partial

import torch
from sdeflow_plugins.train.engine import make_fabric
from sdeflow_plugins.train.loop import training
from sdeflow_plugins.train.recipe import Recipe
from sdeflow_plugins.train.state import State
from torch import nn
from torch.utils.data import DataLoader

IMAGES = 2048
FOREVER = 10**6


@dataclass(frozen=True)
class Case:
    """What is trained: a UNet2DModel, by the name of its preset, on images of that shape."""

    network: str
    shape: tuple[int, int, int]
    batch: int


@dataclass(frozen=True)
class How:
    """device: cpu or cuda. compile: ours alone, by the recipe's option. bf16: autocast, for all."""

    device: str = "cpu"
    compile: bool = False
    bf16: bool = False

    def autocast(self):
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16)


class Images(torch.utils.data.Dataset):
    """Random images in memory, between low and 1; a batch is one gather, for all competitors."""

    def __init__(self, case, low=-1.0):
        generator = torch.Generator().manual_seed(0)
        self.x = low + (1 - low) * torch.rand(IMAGES, *case.shape, generator=generator)
        self.shape = case.shape

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index]

    def __getitems__(self, indices):
        return list(self.x[torch.as_tensor(indices)])


def quiet():
    """Bars draw themselves, but nobody sees it."""
    return contextlib.redirect_stderr(io.StringIO())


def recipe_of(case, how):
    options = {"compile": True} if how.compile else {}
    return Recipe(
        network=case.network,
        steps=FOREVER,
        batch_size=case.batch,
        device=how.device,
        precision="bf16" if how.bf16 else "fp32",
        **options,
    )


def unet(case):
    """The network of the case, with the same random weights for everybody."""
    return recipe_of(case, How()).make_network(case.shape).unet


def size(network):
    return sum(p.numel() for p in network.parameters())


# ---- training


def ours(case, how):
    from tqdm.auto import tqdm

    recipe, data = recipe_of(case, how), Images(case)
    fabric = make_fabric(recipe)
    state = State.fresh(recipe, data.shape, fabric.device)
    records = training(recipe, data, state, fabric)

    def run(steps):
        with quiet():
            bar = tqdm(itertools.islice(records, steps), total=steps, unit="step")
            for record in bar:
                if record.step % recipe.log_every == 0:
                    bar.set_postfix(loss=f"{record.loss:.4f}", lr=f"{record.lr:.1e}")

    return run


def diffusers(case, how):
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_cosine_schedule_with_warmup
    from diffusers.training_utils import EMAModel
    from tqdm.auto import tqdm

    model = unet(case).to(how.device)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    rate = get_cosine_schedule_with_warmup(optimizer, 500, FOREVER)
    average = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True)
    average.to(how.device)
    loader = DataLoader(
        Images(case), batch_size=case.batch, shuffle=True, pin_memory=how.device == "cuda"
    )
    batches = (batch for _ in itertools.count() for batch in loader)
    model.train()

    def run(steps):
        with quiet():
            bar = tqdm(total=steps)
            for clean in itertools.islice(batches, steps):
                clean = clean.to(how.device)
                noise = torch.randn(clean.shape, device=how.device)
                t = torch.randint(0, 1000, (len(clean),), device=how.device, dtype=torch.int64)
                noisy = scheduler.add_noise(clean, noise, t)
                with how.autocast():
                    predicted = model(noisy, t, return_dict=False)[0]
                    loss = nn.functional.mse_loss(predicted.float(), noise)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                rate.step()
                optimizer.zero_grad()
                average.step(model.parameters())
                bar.update(1)
                bar.set_postfix(loss=loss.detach().item(), lr=rate.get_last_lr()[0])

    return run


def ddpm_pytorch(case, how, own=False):
    """own: with its own Unet at matched parameters, else with the network of the others."""
    library = peer()
    os.environ["ACCELERATE_USE_CPU"] = str(how.device == "cpu").lower()
    library.Dataset = lambda *_, **__: Images(case, low=0.0)  # it maps [0, 1] to [-1, 1] itself
    library.cpu_count = lambda: 0
    library.DataLoader = partial(loader_of, how)
    folder = tempfile.mkdtemp()
    trainer = library.Trainer(
        gaussian_diffusion(case, own),
        folder,
        train_batch_size=case.batch,
        train_num_steps=FOREVER,
        save_and_sample_every=FOREVER,
        calculate_fid=False,
        amp=how.bf16,
        mixed_precision_type="bf16",
        results_folder=folder,
    )

    def run(steps):
        trainer.train_num_steps = trainer.step + steps
        with quiet(), contextlib.redirect_stdout(io.StringIO()):
            trainer.train()

    return run


def loader_of(how, *args, **options):
    """Its loader, which pins memory; without CUDA that would only warn."""
    return DataLoader(*args, **options | {"pin_memory": how.device == "cuda"})


def has_peer():
    """Whether denoising-diffusion-pytorch is installed."""
    return importlib.util.find_spec("denoising_diffusion_pytorch") is not None


def peer():
    """The main module of denoising-diffusion-pytorch."""
    import diffusers  # noqa: F401  before the stand-ins, which it would look for

    stand_ins = {name: types.ModuleType(name) for name in ["torchvision", "torchvision.utils"]}
    stand_ins["torchvision"].transforms = types.ModuleType("torchvision.transforms")
    stand_ins["torchvision"].utils = stand_ins["torchvision.utils"]
    sys.modules |= stand_ins
    try:
        import denoising_diffusion_pytorch.denoising_diffusion_pytorch as library
    finally:
        for name in stand_ins:
            del sys.modules[name]
    return library


class Adapted(nn.Module):
    """A UNet2DModel as a network for denoising-diffusion-pytorch."""

    self_condition = False

    def __init__(self, network, channels):
        super().__init__()
        self.network, self.channels, self.out_dim = network, channels, channels

    def forward(self, x, t, x_self_cond=None):
        return self.network(x, t, return_dict=False)[0]


def own_unet(case):
    """Its Unet, of the even width with which it comes nearest to the parameters of the case."""
    library, wanted = peer(), size(unet(case))
    make = partial(library.Unet, channels=case.shape[0], dim_mults=multiples(case))
    with torch.device("meta"):
        width = min(range(8, 257, 2), key=lambda dim: abs(size(make(dim)) - wanted))
    return make(width)


def multiples(case):
    """The widths of the levels over that of the first."""
    widths = unet(case).config.block_out_channels
    return tuple(width // widths[0] for width in widths)


def gaussian_diffusion(case, own, **options):
    network = own_unet(case) if own else Adapted(unet(case), case.shape[0])
    return peer().GaussianDiffusion(network, image_size=case.shape[1:], **options)


# ---- sampling: each gives (images per call, a call without arguments)


def sampling(case, how, steps):
    """{label: call}; a call makes one batch by `steps` evaluations of the network."""
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DPMSolverMultistepScheduler

    from sdeflow import probability_flow, sample

    recipe = recipe_of(case, how)
    shape = (case.batch, *case.shape)
    network = recipe.make_network(case.shape).to(how.device).eval()
    if how.compile:
        network.compile()
    denoiser = recipe.make_denoiser(network)
    flow = probability_flow(denoiser.sde, denoiser)
    times = torch.linspace(1, 0, steps + 1, device=how.device)[:-1, None].expand(-1, case.batch)

    def bare():
        x = torch.randn(shape, device=how.device)
        with torch.no_grad(), how.autocast():
            for t in times:
                network(x, t)

    def our(solver):
        with how.autocast():
            sample(flow, shape, solver=solver, steps=steps, device=how.device)

    def pipeline(kind, scheduler):
        pipe = kind(unet(case).eval(), scheduler).to(how.device)

        def call():
            with quiet(), how.autocast():
                pipe(case.batch, num_inference_steps=steps, output_type="pt", return_dict=False)

        return call

    def ddim_sample(own):
        model = gaussian_diffusion(case, own, sampling_timesteps=steps).to(how.device).eval()

        def call():
            with quiet(), how.autocast():
                model.sample(batch_size=case.batch)

        return call

    calls = {
        "the bare network": bare,
        "sdeflow, ddim": partial(our, "ddim"),
        "sdeflow, dpmpp_2m": partial(our, "dpmpp_2m"),
        "diffusers, DDIMPipeline": pipeline(DDIMPipeline, DDIMScheduler()),
        "diffusers, DPMSolverMultistep": pipeline(DDPMPipeline, DPMSolverMultistepScheduler()),
    }
    if has_peer():
        calls["ddpm-pytorch, ddim_sample"] = ddim_sample(own=False)
        calls["ddpm-pytorch, ddim_sample, own Unet"] = ddim_sample(own=True)
    return calls
