"""A folder of colour images: letters drawn with Pillow's own font, learnt from the files.

    python examples/color_glyphs.py --run runs/glyphs --out color_glyphs.png

Writes runs/glyph_images/train/A/0000.png and so on, letters in random colours, sizes and slants; a
folder of your own pictures would do as well, its subfolders being the classes. Trains on it, as

    sdeflow train runs/glyphs --data folder --data_options.path runs/glyph_images --conditional true

does: the run folder gets checkpoints, metrics, sample grids and a README.md. At last it samples
every letter with guidance. Four minutes on a CPU.
"""

import argparse
import colorsys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from sdeflow_plugins.guidance import cfg
from sdeflow_plugins.pictures import tile
from sdeflow_plugins.train.recipe import Recipe
from sdeflow_plugins.train.session import train_run

from sdeflow import probability_flow, sample

LETTERS = "ABEGKMRS"
SIZE = 16


def glyph(letter, rng):
    """One picture: a dark or light letter on a coloured ground, drawn large and reduced."""
    hue, large = rng.uniform(), 4 * SIZE
    ground = colorsys.hsv_to_rgb(hue, rng.uniform(0.3, 0.7), rng.uniform(0.75, 1.0))
    shade = colorsys.hsv_to_rgb((hue + 0.5) % 1, rng.uniform(0.6, 1.0), rng.uniform(0.1, 0.4))
    ground, shade = (tuple(round(255 * c) for c in color) for color in (ground, shade))
    image = Image.new("RGB", (large, large), ground)
    font = ImageFont.load_default(size=large * rng.uniform(0.7, 0.95))
    place = large / 2 + large * rng.uniform(-0.04, 0.04, size=2)
    ImageDraw.Draw(image).text(tuple(place), letter, fill=shade, font=font, anchor="mm")
    image = image.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, fillcolor=ground)
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def write_folder(root, each):
    """`each` pictures of each letter, in one folder a letter; every tenth is for testing."""
    rng = np.random.default_rng(0)
    for letter in LETTERS:
        for k in range(each):
            file = root / ("test" if k % 10 == 9 else "train") / letter / f"{k:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            glyph(letter, rng).save(file)


def main(run, steps, each, channels, out):
    folder = Path(run).with_name("glyph_images")
    write_folder(folder, each)
    recipe = Recipe(
        data="folder",
        data_options={"path": str(folder), "size": SIZE, "flip": False},
        network_options={"channels": channels},
        conditional=True,
        steps=steps,
        batch_size=16,
        lr=1e-3,
        save_every=max(500, steps // 4),
    )
    trained = train_run(run, recipe)
    denoiser, shape = trained.denoiser()

    labels = torch.arange(len(LETTERS)).repeat_interleave(8)
    flow = probability_flow(denoiser.sde, cfg(denoiser, labels, w=1.5))
    made = sample(flow, (len(labels), *shape), solver="dpmpp_2m", steps=20, seed=0).x
    real = trained.dataset("test")
    rows = [torch.where(real.labels == k)[0].repeat(8)[:8] for k in range(len(LETTERS))]
    shown = torch.stack([real[int(i)] for i in torch.cat(rows)])
    gap = torch.ones(len(LETTERS), 1, *shape)  # an empty column between real and generated
    both = [x.reshape(len(LETTERS), 8, *shape) for x in (shown, made)]
    sheet = torch.cat((both[0], gap, both[1]), 1)
    tile(sheet.flatten(0, 1), columns=17, size=32, gap=4).save(out)
    print(f"{out}: real on the left, generated on the right")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="runs/glyphs", help="the run folder; it must be new")
    parser.add_argument("--steps", type=int, default=2500, help="of training")
    parser.add_argument("--each", type=int, default=200, help="pictures of each letter")
    parser.add_argument("--quick", action="store_true", help="a few small steps, as the tests do")
    parser.add_argument("--out", default="color_glyphs.png", help="where to draw it")
    args = parser.parse_args()
    if args.quick:
        main(args.run, 4, 10, [8, 16], args.out)
    else:
        main(args.run, args.steps, args.each, [32, 64, 64], args.out)
