"""Waveforms: chirps that rise or fall in pitch, made by a network for one-dimensional states.

    python examples/waveforms.py --out waveforms.png

A sound, a seismogram or any other series is a state of shape (channels, length). Here it is a
chirp of 128 samples whose pitch rises (class 0) or falls (class 1); data, network, loss and sampler
are those of images otherwise. Prints how many of the generated chirps go the way that was asked
for, and how far their mean power spectrum is from the real one, beside the distance of two real
sets. A minute or two on a CPU.
"""

import argparse
import math

import matplotlib.pyplot as plt
import torch
from sdeflow_plugins.data import TensorData
from sdeflow_plugins.guidance import cfg
from sdeflow_plugins.train.fit import fit
from sdeflow_plugins.train.recipe import Recipe

from sdeflow import probability_flow, sample

LENGTH = 128
NAMES = ["rising", "falling"]


def chirps(n, seed):
    """n chirps (n, 1, LENGTH) in [-1, 1] and their classes: sin of a quadratic phase, faded."""
    generator = torch.Generator().manual_seed(seed)
    low, rise, phase, centre = torch.rand(4, n, 1, generator=generator)
    labels = torch.arange(n) % 2
    u = torch.linspace(0, 1, LENGTH)
    u_up = torch.where(labels[:, None] == 0, u, 1 - u)  # a falling chirp is a rising one, reversed
    first, last = 2 + 4 * low, 12 + 12 * rise  # cycles in the whole length
    x = torch.sin(2 * math.pi * (first * u_up + (last - first) * u_up**2 / 2 + phase))
    fade = torch.exp(-(((u - 0.35 - 0.3 * centre) / 0.3) ** 2))
    return TensorData((x * fade)[:, None], labels, NAMES)


def direction(x):
    """0 where the second half of a chirp has the higher mean frequency, else 1."""
    halves = torch.fft.rfft(x[:, 0].reshape(len(x), 2, -1)).abs() ** 2
    frequency = torch.arange(halves.shape[-1], dtype=x.dtype)
    centre = (halves * frequency).sum(2) / halves.sum(2)
    return (centre[:, 0] > centre[:, 1]).long()


def spectrum(x):
    """The mean power at each frequency."""
    return (torch.fft.rfft(x[:, 0]).abs() ** 2).mean(0) / LENGTH


def draw(real, made, labels, out):
    figure = plt.figure(figsize=(8, 5.2), layout="constrained")
    parts = figure.subfigures(1, 3, width_ratios=[1, 1, 1.1])
    for part, title, x in zip(parts, ["real", "generated"], [real.x, made], strict=False):
        part.suptitle(title, fontsize=10)
        for k, ax in enumerate(part.subplots(8, 1)):
            row = (labels == k % 2).nonzero()[k // 2, 0]
            ax.plot(x[row, 0], lw=0.8, color=["#00798c", "#d1495b"][k % 2])
            ax.set(ylim=(-1.1, 1.1))
            ax.axis("off")
    axes = parts[2].subplots(3, 1)
    axes[0].plot(spectrum(real.x), color="0.5", lw=2.5, label="real")
    axes[0].plot(spectrum(made), color="#00798c", lw=1, label="generated")
    axes[0].set(xlim=(0, 40), ylabel="power", xlabel="cycles")
    axes[0].legend(frameon=False, fontsize=8)
    window = torch.hann_window(32)
    for k, ax in enumerate(axes[1:]):
        row = (labels == k).nonzero()[0, 0]
        image = torch.stft(made[row, 0], 32, 2, window=window, return_complex=True).abs()
        ax.imshow(image[:17].numpy(), origin="lower", aspect="auto", cmap="magma")
        ax.set(xticks=[], yticks=[], ylabel="pitch", title=f"generated, {NAMES[k]}")
        ax.title.set_fontsize(8)
    figure.savefig(out, dpi=110)
    print(out)


def main(steps, channels, batch, n, out):
    recipe = Recipe(
        network="unet_1d",
        network_options={"channels": channels, "kernel": 5},
        conditional=True,
        steps=steps,
        batch_size=batch,
        lr=2e-3,
    )
    data, test = chirps(8192, seed=0), chirps(n, seed=1)
    denoiser = fit(recipe, data)
    flow = probability_flow(denoiser.sde, cfg(denoiser, test.labels, w=1.0))
    made = sample(flow, (n, *data.shape), solver="dpmpp_2m", steps=20, seed=0).x
    print(f"\n{'':>10} {'right way':>10} {'spectral distance':>18}")
    target = spectrum(data.x)
    for name, x in [("real", test.x), ("generated", made)]:
        right = (direction(x) == test.labels).double().mean()
        distance = (spectrum(x) - target).abs().sum() / target.sum()
        print(f"{name:>10} {right:10.3f} {distance:18.3f}")
    draw(test, made, test.labels, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200, help="of training")
    parser.add_argument("--n", type=int, default=512, help="chirps to generate")
    parser.add_argument("--quick", action="store_true", help="a few steps, as the tests do")
    parser.add_argument("--out", default="waveforms.png", help="where to draw it")
    args = parser.parse_args()
    if args.quick:
        main(8, [8, 16], 16, 16, args.out)
    else:
        main(args.steps, [32, 48, 64], 32, args.n, args.out)
