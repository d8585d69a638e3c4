"""Option prices by simulation, beside their exact values, with error bars.

    python examples/black_scholes.py --out black_scholes.png

A European call on a stock that follows geometric Brownian motion: the price against the formula of
Black and Scholes (1973), its error against the number of steps, and the Greeks, both from common
random numbers and from gradients through the solver. Then the same call under Heston's stochastic
volatility, against the integral of Heston (1993). Half a minute on a CPU.
"""

import argparse
import math
from dataclasses import dataclass
from statistics import NormalDist

import matplotlib.pyplot as plt
import torch
from PIL import Image

from sdeflow import SDE, BrownianPath, Heston, integrate

SPOT, STRIKE, RATE, VOL, YEARS = 1.0, 0.8, 0.05, 0.4, 1.0
DISCOUNT = math.exp(-RATE * YEARS)
NORMAL = NormalDist()
SOLVERS = {"euler_maruyama": "#d55e00", "milstein": "#0072b2"}


@dataclass(frozen=True)
class Stock(SDE):
    """dS = rate S dt + volatility S dw; the volatility may be a tensor with a gradient."""

    volatility: object = VOL
    T: float = YEARS

    def drift(self, x, t):
        return RATE * x

    def diffusion(self, x, t):
        return self.volatility * x


def black_scholes():
    """The exact price, delta and vega."""
    root = VOL * math.sqrt(YEARS)
    d1 = (math.log(SPOT / STRIKE) + RATE * YEARS) / root + root / 2
    price = SPOT * NORMAL.cdf(d1) - STRIKE * DISCOUNT * NORMAL.cdf(d1 - root)
    return price, NORMAL.cdf(d1), SPOT * NORMAL.pdf(d1) * math.sqrt(YEARS)


def payoff(price):
    return DISCOUNT * (price - STRIKE).clamp_min(0)


def mean(values):
    """The mean and its standard error."""
    return values.mean().item(), (values.std() / math.sqrt(values.numel())).item()


def simulate(volatility, spot, n, steps, solver, **options):
    """Prices of the stock after a year, (n, 1) in float64, on equal steps."""
    x = spot * torch.ones(n, 1, dtype=torch.float64)
    ts = torch.linspace(0, YEARS, steps + 1, dtype=torch.float64)
    return integrate(Stock(volatility), x, ts, solver, **options).x


def convergence(n, steps):
    """{solver: ([(weak error, its error bar)], [strong error])}, on one set of Brownian paths.

    The exact payoff on the same paths is a control variate: the error bars are those of the
    difference alone.
    """
    times = torch.linspace(0, YEARS, steps[-1] + 1, dtype=torch.float64)
    path = BrownianPath(7, (n, 1), times, dtype=torch.float64)
    w = math.sqrt(YEARS) * path(times[0], times[-1])
    exact = SPOT * torch.exp((RATE - VOL**2 / 2) * YEARS + VOL * w)
    curves = {}
    for solver in SOLVERS:
        runs = [simulate(VOL, SPOT, n, k, solver, noise=path) for k in steps]
        weak = [mean(payoff(x) - payoff(exact)) for x in runs]
        curves[solver] = weak, [mean((x - exact).abs())[0] for x in runs]
    return curves, mean(payoff(exact))


def greeks(n, steps=64):
    """Delta and vega, (value, error bar): bumped with common and with fresh noise, and pathwise."""
    bump, found = 0.01, {}
    for name, seeds in [("common random numbers", (1, 1)), ("fresh random numbers", (1, 2))]:
        (up, down), sides = seeds, (1 + bump, 1 - bump)
        pairs = {
            "delta": [(VOL, SPOT * side) for side in sides] + [SPOT],
            "vega": [(VOL * side, SPOT) for side in sides] + [VOL],
        }
        found[name] = {}
        for greek, (high, low, size) in pairs.items():
            difference = payoff(simulate(*high, n, steps, "milstein", seed=up))
            difference = difference - payoff(simulate(*low, n, steps, "milstein", seed=down))
            found[name][greek] = mean(difference / (2 * bump * size))
    # One spot and one volatility a path: the gradients are the pathwise Greeks, with error bars.
    spot, vol = (
        torch.full((n, 1), v, dtype=torch.float64, requires_grad=True) for v in (SPOT, VOL)
    )
    payoff(simulate(vol, spot, n, steps, "milstein", seed=1, grad=True)).sum().backward()
    found["gradients through the run"] = {"delta": mean(spot.grad), "vega": mean(vol.grad)}
    return found


def heston_call(sde, variance):
    """Heston's price by one integral (Lewis, 2001), with the characteristic function of log S in
    the form that has no branch cut (Albrecher et al., 2007)."""
    u = torch.linspace(1e-8, 200, 200_001, dtype=torch.float64) - 0.5j
    beta = sde.kappa - 1j * sde.rho * sde.xi * u
    d = torch.sqrt(beta**2 + sde.xi**2 * (1j * u + u**2))
    g, e = (beta - d) / (beta + d), torch.exp(-d * YEARS)
    C = sde.kappa * sde.theta / sde.xi**2
    C = C * ((beta - d) * YEARS - 2 * torch.log((1 - g * e) / (1 - g)))
    D = (beta - d) / sde.xi**2 * (1 - e) / (1 - g * e)
    forward = SPOT / DISCOUNT
    wave = torch.exp(C + D * variance + 1j * u * math.log(forward / STRIKE))
    integral = torch.trapezoid((wave / (u**2 + 1j * u)).real, u.real) / math.pi
    # With u = v - i/2, u^2 + i u = v^2 + 1/4.
    return DISCOUNT * (forward - STRIKE * integral.item())


def main(n, out):
    price, delta, vega = black_scholes()
    steps = [4, 8, 16, 32, 64, 128]
    curves, (value, bar) = convergence(n, steps)
    print(
        f"European call, exactly {price:.5f}; {n} paths with exact steps {value:.5f} +- {bar:.5f}"
    )
    for solver, (weak, strong) in curves.items():
        print(f"  {solver}\n    steps   error of the price     error of a path")
        for k, (error, width), path in zip(steps, weak, strong, strict=True):
            print(f"    {k:5d}  {error:+.5f} +- {width:.5f}     {path:.5f}")
    print(f"Greeks{'':26s}delta {delta:.4f}{'':10s}vega {vega:.4f}")
    for name, values in greeks(n // 4).items():
        columns = [f"{value:.4f} +- {bar:.4f}" for value, bar in values.values()]
        print(f"  {name:28s}{columns[0]:>18s}{columns[1]:>21s}")
    sde, x0 = Heston(mu=RATE), torch.tensor([[SPOT, 0.04]], dtype=torch.float64).repeat(n, 1)
    run = integrate(sde, x0, torch.linspace(0, YEARS, 129), "euler_maruyama", seed=3)
    value, bar = mean(payoff(run.x[:, 0]))
    print(f"Heston   exactly {heston_call(sde, 0.04):.5f}; 128 steps {value:.5f} +- {bar:.5f}")
    draw(steps, curves, out)
    print(out)


def draw(steps, curves, out):
    """Weak and strong errors against the step size, with error bars and guides of order 1/2, 1."""
    plt.rcParams |= {"font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False}
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    sizes = [YEARS / k for k in steps]
    for (solver, (weak, strong)), marker in zip(curves.items(), "os", strict=True):
        style = {"color": SOLVERS[solver], "marker": marker, "ms": 4, "lw": 1.4}
        errors, bars = [abs(e) for e, _ in weak], [2 * b for _, b in weak]
        label = solver.replace("_", "-").title()
        axes[0].errorbar(sizes, errors, bars, capsize=2, label=label, **style)
        axes[1].plot(sizes, strong, **style)
        # Guides below the curve: of order 1/2 and 1 for the paths, of order 1 for the price.
        guides = [(axes[1], strong, 0.5)]
        if solver == "milstein":
            guides = [(axes[0], errors, 1), (axes[1], strong, 1)]
        for ax, curve, order in guides:
            line = [0.55 * curve[-1] * (h / sizes[-1]) ** order for h in sizes]
            ax.plot(sizes, line, color="0.6", lw=0.9, ls=(0, (4, 2)))
            ax.annotate(
                f"order {order:g}", (sizes[1], line[1]), (4, -9), textcoords="offset points"
            )
    titles = ["Error of the call's price", "Error of a path, E|S - exact S|"]
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, loc="left", fontweight="bold", fontsize=9.5)
        ax.set(xscale="log", yscale="log", xlabel="step size in years")
        ax.set_xticks(sizes, [f"1/{k}" for k in steps])
        ax.minorticks_off()
        ax.grid(axis="y", color="0.93", lw=0.8)
    axes[0].legend(frameon=False, title="bars: two standard errors", alignment="left")
    figure.savefig(out, dpi=200)
    Image.open(out).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--paths", type=int, default=200_000, help="of each simulation")
    parser.add_argument("--out", default="black_scholes.png", help="where to write the picture")
    args = parser.parse_args()
    main(args.paths, args.out)
