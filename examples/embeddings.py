"""Embeddings: new vectors on the sphere of text embeddings, for a topic that is asked for.

    python examples/embeddings.py --out embeddings.png

Text encoders put texts on a sphere of some hundred dimensions, those of one topic near each other
and spread in a few directions of their own. Such vectors are made here (128 dimensions, 12 topics),
and an MLP learns them by topic. Three checks: the nearest topic centre of each generated vector is
the one asked for; their lengths are 1, which nothing enforced; and within a topic they vary in the
directions in which real ones do. A minute on a CPU. Your own: replace `embeddings` by the rows of
a file, or `sdeflow train runs/mine --data arrays --network mlp --data_options.path vectors.npy`.
"""

import argparse
import math

import matplotlib.pyplot as plt
import torch
from sdeflow_plugins.data import TensorData
from sdeflow_plugins.guidance import cfg
from sdeflow_plugins.train.fit import fit
from sdeflow_plugins.train.recipe import Recipe
from torch.nn.functional import normalize

from sdeflow import probability_flow, sample

DIM, TOPICS, RANK = 128, 12, 4
SCALE = math.sqrt(DIM)  # a diffusion model likes numbers of size 1, not 1/sqrt(DIM)


def embeddings(n, seed):
    """n unit vectors (n, DIM) with topics: a centre, 4 directions of the topic, a little of all."""
    world = torch.Generator().manual_seed(0)
    centres = normalize(torch.randn(TOPICS, DIM, generator=world), dim=1)
    directions = torch.randn(TOPICS, RANK, DIM, generator=world) / SCALE
    generator = torch.Generator().manual_seed(1 + seed)
    topic = torch.randint(TOPICS, (n,), generator=generator)
    along = torch.randn(n, RANK, generator=generator) * torch.tensor([0.6, 0.4, 0.3, 0.2])
    around = 0.15 * torch.randn(n, DIM, generator=generator) / SCALE
    spread = torch.einsum("nr,nrd->nd", along, directions[topic])
    x = normalize(centres[topic] + spread + around, dim=1)
    return TensorData(SCALE * x, topic)


def by_topic(x, topic):
    """The centre of each topic, and the mean variances in the leading directions within one."""
    parts = [x[topic == k] for k in range(TOPICS)]
    centres = normalize(torch.stack([part.mean(0) for part in parts]), dim=1)
    spectra = [torch.linalg.svdvals(p - p.mean(0)) ** 2 / len(p) for p in parts if len(p) > 16]
    return centres, torch.stack([s[:16] for s in spectra]).mean(0)


def draw(real, made, topic, out):
    figure, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
    plane = torch.linalg.svd(real - real.mean(0), full_matrices=False).Vh[:2].T
    hues = [plt.get_cmap("tab20")(k) for k in range(TOPICS)]
    for k, hue in enumerate(hues):
        axes[0].scatter(*(real[topic == k] @ plane).T, s=8, color=hue, alpha=0.25, linewidths=0)
        axes[0].scatter(*(made[topic == k] @ plane).T, s=3, color=hue, linewidths=0)
    axes[0].set(xticks=[], yticks=[], title="two principal directions\npale: real, dark: generated")
    style = {"bins": 60, "density": True, "range": (-0.6, 1)}
    axes[1].hist((real @ real.T).flatten().numpy(), color="0.8", label="real", **style)
    line = {"histtype": "step", "color": "#00798c"}
    axes[1].hist((made @ real.T).flatten().numpy(), label="generated to real", **line, **style)
    axes[1].set(title="cosine of two vectors", yticks=[], xlabel="cosine")
    axes[1].legend(frameon=False, fontsize=8)
    axes[2].semilogy(by_topic(real, topic)[1], color="0.5", lw=3, label="real")
    axes[2].semilogy(by_topic(made, topic)[1], "o-", color="#00798c", ms=3, lw=1, label="generated")
    axes[2].set(title="variance within a topic", xlabel="direction")
    axes[2].legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=110)
    print(out)


def main(steps, width, batch, n, out):
    recipe = Recipe(
        network="mlp",
        network_options={"width": width, "depth": 4},
        conditional=True,
        steps=steps,
        batch_size=batch,
        lr=2e-3,
    )
    data, test = embeddings(20_000, seed=0), embeddings(n, seed=1)
    denoiser = fit(recipe, data)
    flow = probability_flow(denoiser.sde, cfg(denoiser, test.labels, w=1.0))
    made = sample(flow, (n, DIM), solver="dpmpp_2m", steps=20, seed=0).x
    centres, _ = by_topic(data.x, data.labels)
    print(f"\n{'':>10} {'right topic':>12} {'length':>16} {'variance within':>16}")
    for name, x in [("real", test.x), ("generated", made)]:
        x = x / SCALE
        right = ((x @ centres.T).argmax(1) == test.labels).double().mean()
        length = f"{x.norm(dim=1).mean():.3f} +- {x.norm(dim=1).std():.3f}"
        inside = by_topic(x, test.labels)[1][:RANK].sum()
        print(f"{name:>10} {right:12.3f} {length:>16} {inside:16.3f}")
    draw(test.x / SCALE, made / SCALE, test.labels, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000, help="of training")
    parser.add_argument("--n", type=int, default=2000, help="vectors to generate")
    parser.add_argument("--quick", action="store_true", help="a few steps, as the tests do")
    parser.add_argument("--out", default="embeddings.png", help="where to draw it")
    args = parser.parse_args()
    if args.quick:
        main(40, 64, 64, 300, args.out)
    else:
        main(args.steps, 256, 128, args.n, args.out)
