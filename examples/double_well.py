"""A nonlinear SDE run backwards: its score is learnt from simulated paths, for it has no formula.

    python examples/double_well.py --out double_well.png

A particle in a double well starts on the left and leaks to the right. Nothing but drift and
diffusion is given: `score_loss` simulates paths, and regresses a network on the transition density
of a short piece of each. Run backwards, the particles return to where they came from. Prints how
far the reverse marginals are from the forward ones, and draws both. One to two minutes on a CPU.
"""

import argparse
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from PIL import Image

from sdeflow import SDE, integrate, probability_flow, reverse, score_loss

KT = 0.2  # temperature
TIMES = [0.0, 0.4, 1.6, 4.0, 8.0]


@dataclass(frozen=True)
class DoubleWell(SDE):
    """dx = -U'(x) dt + sqrt(2 kT) dw, U = (x^2 - 1)^2/4: two wells, and a barrier of 1.25 kT."""

    T: float = TIMES[-1]
    additive = True

    def drift(self, x, t):
        return x - x**3

    def diffusion(self, x, t):
        return torch.full_like(x, (2 * KT) ** 0.5)


class Score(torch.nn.Module):
    """s(x, t) = -U'(x)/kT + a small network, for t of shape () or (B,).

    What is learnt is how far the law is from equilibrium. Where no path went, the network knows
    nothing, and then the first term makes the reverse process fall back into the wells.
    """

    def __init__(self, width=64):
        super().__init__()
        sizes = [6, width, width, width, 1]
        layers = [[torch.nn.Linear(a, b), torch.nn.SiLU()] for a, b in zip(sizes, sizes[1:])]  # noqa: B905
        self.layers = torch.nn.Sequential(*sum(layers, [])[:-1])

    def forward(self, x, t):
        t = t.to(x).expand(len(x)).unsqueeze(1)
        clock = torch.cat([(-rate * t).exp() for rate in (0.2, 0.5, 2, 8, 32)], 1)  # fast at first
        return DoubleWell().drift(x, t) / KT + self.layers(torch.cat((x, clock), 1))


def data(n, generator):
    """Where the particles start: near -1, in the left well."""
    return -1 + 0.25 * torch.randn(n, 1, generator=generator)


def train(sde, steps, generator):
    """The score, and what it was trained with."""
    score, loss_of = Score(), score_loss(sde, gap=0.1, substeps=5, every=5, solver="heun")
    optimizer = torch.optim.Adam(score.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    print(loss_of)
    for step in range(1, steps + 1):
        loss = loss_of(score, data(256, generator), generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step == 1 or step % max(1, steps // 5) == 0:
            print(f"step {step:5d}   loss {loss.item():.3f}", flush=True)
    return score.requires_grad_(False)


def densities(x):
    """The exact densities at TIMES on the even grid x: jumps to neighbours, in detailed balance."""
    step, energy = x[1] - x[0], (x**2 - 1) ** 2 / 4
    half = energy.diff() / (2 * KT)
    up, down = (KT / step**2 * torch.exp(sign * half) for sign in (-1, 1))
    jumps = torch.diag(up, -1) + torch.diag(down, 1)
    jumps -= torch.diag(jumps.sum(0))
    start = torch.exp(-((x + 1) ** 2) / (2 * 0.25**2))
    start /= start.sum() * step
    return [torch.matrix_exp(jumps * t) @ start for t in TIMES]


def wasserstein(a, b):
    """The Wasserstein-1 distance of two samples of one size."""
    return (a.flatten().sort().values - b.flatten().sort().values).abs().mean().item()


def main(steps, n, out):
    torch.manual_seed(0)  # of the weights; all else draws from generators and seeds of its own
    sde, generator = DoubleWell(), torch.Generator().manual_seed(0)
    score = train(sde, steps, generator)

    ts = torch.linspace(0, sde.T, 401)
    shown = [round(t / sde.T * 400) for t in TIMES]
    runs = {}
    for name, seed in [("forward", 1), ("forward again", 2)]:
        runs[name] = integrate(sde, data(n, generator), ts, "heun", seed=seed, keep=True).path
    # The reverse processes begin where other particles ended: those of the second run.
    end, back = runs["forward again"][-1], ts.flip(0)
    for name, process in [
        ("reverse SDE", reverse(sde, score)),
        ("probability flow", probability_flow(sde, score)),
    ]:
        runs[name] = integrate(process, end, back, "heun", seed=3, keep=True).path.flip(0)

    print(f"\nWasserstein-1 distance to the forward run, {n} particles each\n{'t':>20}", end="")
    print("".join(f"{t:8.1f}" for t in TIMES))
    for name in ["forward again", "reverse SDE", "probability flow"]:
        distances = [wasserstein(runs[name][k], runs["forward"][k]) for k in shown]
        print(f"{name:>20}" + "".join(f"{d:8.3f}" for d in distances))
    draw(score, {name: path[shown, :, 0] for name, path in runs.items()}, out)
    print(f"\n{out}")


def draw(score, runs, out):
    plt.rcParams |= {"font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False}
    figure, axes = plt.subplots(2, 3, figsize=(8, 4.6), layout="constrained")
    x = torch.linspace(-2.6, 2.6, 521, dtype=torch.float64)
    exact, bins = densities(x), torch.linspace(-2.2, 2.2, 56).numpy()
    hues = {"reverse SDE": "#d55e00", "probability flow": "#0072b2"}
    for k, (ax, t) in enumerate(zip(axes.flat, TIMES, strict=False)):
        ax.hist(runs["forward"][k].numpy(), bins, density=True, color="0.86", label="forward SDE")
        for name, hue in hues.items():
            line = {"histtype": "step", "lw": 1.2, "color": hue, "label": name}
            ax.hist(runs[name][k].numpy(), bins, density=True, **line)
        ax.plot(x, exact[k], color="black", lw=0.9, ls=(0, (4, 2)), label="exact density")
        ax.set_title(f"t = {t:g}", loc="left", fontweight="bold", fontsize=9)
        ax.set(xlim=(-2.2, 2.2), ylim=(0, 1.75), yticks=[], xlabel="x")
        ax.spines["left"].set_visible(False)
    axes[0, 1].legend(frameon=False, loc="upper right", fontsize=8)
    ax = axes[1, 2]
    for k, hue in [(1, "#56b4e9"), (2, "#009e73"), (4, "#e69f00")]:
        inside = exact[k] > 0.01 * exact[k].max()
        u = x[inside]
        learnt = score(u.float().unsqueeze(1), torch.tensor(TIMES[k]))
        ax.plot(u, learnt, color=hue, lw=3, label=f"t = {TIMES[k]:g}")
        (slope,) = torch.gradient(exact[k].log(), spacing=(x,))
        ax.plot(u, slope[inside], color="black", lw=0.9, ls=(0, (4, 2)))
    ax.axhline(0, color="0.85", lw=0.8, zorder=0)
    ax.set_title("score, learnt and exact", loc="left", fontweight="bold", fontsize=9)
    ax.set(xlim=(-2.2, 2.2), xlabel="x")
    ax.legend(frameon=False, fontsize=8)
    ax.text(-2.1, -13, "dashed: exact", color="0.3")
    figure.savefig(out, dpi=200)
    Image.open(out).convert("RGB").quantize(255, dither=Image.Dither.NONE).save(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="of training")
    parser.add_argument("--particles", type=int, default=20_000, help="of each run")
    parser.add_argument("--out", default="double_well.png", help="where to write the picture")
    args = parser.parse_args()
    main(args.steps, args.particles, args.out)
