"""Points in the plane: learn their score, then draw samples, the density and the paths between.

    python examples/toys.py --out toys.png

A small network is trained on three clouds of points. The probability flow carries noise to data
along smooth paths; run the other way it gives every point its density,
log p_0(x_0) = log p_T(x_T) + int_0^T div f(x_t, t) dt. Prints the mean log-likelihood of held-out
points beside the entropy of the true law: no model can have more. Two minutes on a CPU.
"""

import argparse
import math
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sdeflow import Cosine, Denoiser, get, probability_flow, sample, score_matching

SDE = Cosine()
SCALE, REACH = 3, 3.3  # the data sets lie in [-1, 1]^2: as wide as the noise they are learnt sooner
TOYS = {  # name: mean log-likelihood of the true law, minus its entropy in nats
    "gaussians": -math.log(8 * 2 * math.pi * math.e * (0.04 * SCALE) ** 2),  # eight
    "checkerboard": -math.log(8 * (SCALE / 2.2) ** 2),  # eight squares
    "spirals": None,
}


def points(name, split, n):
    """n points of a cloud, (n, 2)."""
    return SCALE * get("dataset", name, split=split, n=n).x


class Network(torch.nn.Module):
    """F(x, t): a plain MLP of x and of waves in x and t, without which it would learn fine
    structure slowly. Any module that is called as net(x, t), x (B, 2) and t (B,), will do."""

    def __init__(self, width=192):
        super().__init__()
        self.register_buffer("waves", torch.cat((3 * torch.randn(2, 64), torch.zeros(2, 8)), 1))
        self.register_buffer("rates", torch.cat((torch.zeros(64), math.pi * torch.arange(1, 9))))
        sizes = [2 + 2 * 72, width, width, width, 2]
        layers = [(torch.nn.Linear(a, b), torch.nn.SiLU()) for a, b in pairwise(sizes)]
        self.layers = torch.nn.Sequential(*sum(layers, ())[:-1])

    def forward(self, x, t):
        angle = x @ self.waves + t.to(x)[:, None] * self.rates
        return self.layers(torch.cat((x, angle.sin(), angle.cos()), 1))


def train(x, steps):
    """The denoiser of a cloud of points x (N, 2), with averaged weights."""
    net = Network()
    denoiser = Denoiser(net, SDE, prediction="v")
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(min(0.998, 1 - 10 / steps)))
    for _ in range(steps):
        batch = x[torch.randint(len(x), (512,))]
        loss = score_matching(denoiser, batch, weighting="prediction")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(net)
    return Denoiser(average.eval().requires_grad_(False), SDE, prediction="v")


def slope(flow, x, t):
    """The drift of the flow at x (B, 2), and its divergence (B,) by autograd."""
    x = x.detach().requires_grad_()
    f = flow.drift(x, t)
    rows = [torch.autograd.grad(f[:, k].sum(), x, retain_graph=True)[0][:, k] for k in (0, 1)]
    return f.detach(), sum(rows)


def log_density(flow, x, steps=48):
    """log p_0 at points x (B, 2): the flow run up in time, by the midpoint rule."""
    gained = torch.zeros(len(x))
    for t, s in pairwise(torch.linspace(SDE.t_min, SDE.T, steps + 1, dtype=torch.float64)):
        h = float(s - t)
        middle = x + h / 2 * flow.drift(x, t)
        f, divergence = slope(flow, middle, (t + s) / 2)
        x, gained = x + h * f, gained + h * divergence
    return gained - x.square().sum(1) / 2 - math.log(2 * math.pi)


def draw(row, name, test, result, density):
    """One row of panels: data, samples, density, paths."""
    for ax, points in zip(row, (test, result.x), strict=False):
        ax.scatter(*points[:4096].T, s=1.2, color="#00798c", linewidths=0)
    row[2].imshow(density.numpy(), origin="lower", extent=2 * (-REACH, REACH), cmap="magma")
    path = result.path[:, :150]
    row[3].plot(path[..., 0], path[..., 1], color="#edae49", lw=0.4, alpha=0.8)
    row[3].scatter(*path[0].T, s=3, color="0.5", linewidths=0)
    row[3].scatter(*path[-1].T, s=5, color="#d1495b", linewidths=0, zorder=3)
    for ax in row:
        ax.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), aspect="equal", xticks=[], yticks=[])
    row[0].set_ylabel(name)


def main(toys, steps, side, out):
    torch.manual_seed(0)
    size = {"figsize": (8, 0.3 + 1.95 * len(toys)), "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(len(toys), 4, **size)
    for title, ax in zip(["data", "samples", "density", "noise to data"], axes[0], strict=True):
        ax.set_title(title, fontsize=10)
    u = torch.linspace(-REACH, REACH, side)
    grid = torch.cartesian_prod(u, u).flip(1)  # rows are y
    print("log-likelihood of held-out points, nats")
    for row, name in zip(axes, toys, strict=True):
        test = points(name, "test", 4096)
        flow = probability_flow(SDE, train(points(name, "train", 65536), steps))
        result = sample(flow, (4096, 2), solver="dpmpp_2m", steps=40, seed=0, keep=True)
        density = log_density(flow, grid).exp().reshape(side, side)
        mass = float(density.sum()) * (2 * REACH / (side - 1)) ** 2
        found = float(log_density(flow, test[:1000]).mean())
        limit = f"{TOYS[name]:.2f}" if TOYS[name] else "unknown"
        print(f"{name:>14} {found:6.2f}, at best {limit}; mass in view {mass:.3f}", flush=True)
        draw(row, name, test, result, density.clamp(max=float(density.quantile(0.995))))
    figure.savefig(out, dpi=110)
    print(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000, help="of training, for each cloud")
    parser.add_argument("--side", type=int, default=200, help="of the density's picture, in pixels")
    parser.add_argument("--quick", action="store_true", help="one cloud, briefly, as the tests do")
    parser.add_argument("--out", default="toys.png", help="where to write the picture")
    args = parser.parse_args()
    if args.quick:
        main(["gaussians"], 200, 72, args.out)
    else:
        main(list(TOYS), args.steps, args.side, args.out)
