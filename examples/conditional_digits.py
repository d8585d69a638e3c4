"""Digits on request: a conditional network, and what classifier-free guidance does to it.

    python examples/conditional_digits.py --out conditional_digits.png

One network learns p(x | digit), and p(x) too, from one label in ten dropped. Guidance follows
D_null + w (D_class - D_null): w = 0 ignores the class, w = 1 is the conditional model, w > 1 goes
beyond it: clearer digits, but less variety. A classifier trained on real digits says how often it
sees the digit that was asked for; the variety is the mean distance within a class, in units of that
of real digits. Two to three minutes on a CPU.
"""

import argparse

import torch
from sdeflow_plugins.guidance import cfg
from sdeflow_plugins.pictures import tile
from sdeflow_plugins.train.fit import fit
from sdeflow_plugins.train.recipe import Recipe
from sklearn.svm import SVC

from sdeflow import probability_flow, sample


def digits(denoiser, shape, labels, w):
    """One image per label, at 15 evaluations; image i comes from seed i whatever w is."""
    flow = probability_flow(denoiser.sde, cfg(denoiser, labels, w))
    run = sample(flow, (len(labels), *shape), solver="dpmpp_2m", steps=15, seed=0)
    return run.x.clamp(-1, 1)


def variety(x, labels):
    """The mean distance of two images of one class."""
    return torch.stack([torch.pdist(x[labels == k].flatten(1)).mean() for k in range(10)]).mean()


def main(steps, each, out):
    recipe = Recipe(conditional=True, steps=steps)
    real, held_out = recipe.make_dataset(), recipe.make_dataset("test")
    denoiser = fit(recipe, real)
    judge = SVC(gamma=0.05).fit(real.x.flatten(1).numpy(), real.labels.numpy())

    def judged(x, labels):
        seen = torch.from_numpy(judge.predict(x.flatten(1).numpy()))
        return f"{(seen == labels).double().mean():9.3f} {variety(x, labels) / unit:9.3f}"

    unit = variety(held_out.x, held_out.labels)
    print(f"{'':>12} {'agreement':>9} {'variety':>9}")
    print(f"{'real':>12} {judged(held_out.x, held_out.labels)}")
    labels = torch.arange(10).repeat_interleave(each)
    grids = {}
    for w in (0.0, 1.0, 2.0, 3.0):
        x = digits(denoiser, real.shape, labels, w)
        print(f"{f'w = {w:g}':>12} {judged(x, labels)}", flush=True)
        grids[w] = x.reshape(10, each, *real.shape)[:, :8]
    gap = torch.full((10, 1, *real.shape), -1.0)  # an empty column between w = 1 and w = 3
    both = torch.cat((grids[1.0], gap, grids[3.0]), 1)
    tile(both.flatten(0, 1), columns=both.shape[1], size=40, gap=4, ink=True).save(out)
    print(f"{out}: a row for each digit, guidance 1 on the left and 3 on the right")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2500, help="of training")
    parser.add_argument("--each", type=int, default=40, help="images of each digit")
    parser.add_argument("--quick", action="store_true", help="a few steps, as the tests do")
    parser.add_argument("--out", default="conditional_digits.png", help="where to draw it")
    args = parser.parse_args()
    main(30 if args.quick else args.steps, 8 if args.quick else args.each, args.out)
