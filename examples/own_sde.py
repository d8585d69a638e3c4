"""Write your own SDE: a Gaussian one from alpha and sigma, any other from drift and diffusion.

    python examples/own_sde.py

Each SDE below is run backwards from noise with its exact score, and what comes out is printed
beside what it should be.
"""

import math
from dataclasses import dataclass

import torch

from sdeflow import SDE, EulerMaruyama, GaussianSDE, integrate, probability_flow, reverse, sample
from sdeflow.testing import GaussianData

# ---- Gaussian: alpha and sigma say it all; drift, diffusion, kernel and log-SNR follow from them.


@dataclass(frozen=True)
class TrigFlow(GaussianSDE):
    """x_t = cos(t) x_0 + sin(t) eps: a quarter turn. Source: Lu & Song (2025), TrigFlow."""

    T: float = 1.57

    def alpha(self, t):
        return torch.cos(t)

    def sigma(self, t):
        return torch.sin(t)


def trig_flow():
    sde = TrigFlow()
    mean, std = torch.tensor([0.7]), torch.tensor([0.4])
    score = GaussianData(sde, mean, std**2)  # a trained network goes here: Denoiser(net, sde)

    print(f"{sde}: mean {mean.item():.3f} and standard deviation {std.item():.3f} from")
    for process, solver, steps in [
        (probability_flow(sde, score), "dpmpp_2m", 10),
        (probability_flow(sde, score), "torchdiffeq_dopri5", 1),
        (reverse(sde, score), "dpmpp_2m", 20),
        (reverse(sde, score), "ddpm", 200),
        (reverse(sde, score), "torchsde_srk", 50),
    ]:
        run = sample(process, (20_000, 1), solver=solver, steps=steps, seed=0)
        kind = "SDE" if process.eta else "ODE"
        print(
            f"  {kind}  {solver:20s}{run.nfe:4d} evaluations  {run.x.mean():.3f} {run.x.std():.3f}"
        )


# ---- Any other: drift and diffusion. This one stays positive, and its noise grows with the state.


@dataclass(frozen=True)
class CIR(SDE):
    """dx = a (b - x) dt + c sqrt(x) dw, an interest rate. Source: Cox, Ingersoll & Ross (1985)."""

    a: float = 1.0
    b: float = 1.0
    c: float = 0.7
    T: float = 1.0

    def drift(self, x, t):
        return self.a * (self.b - x)

    def diffusion(self, x, t):
        return self.c * x.clamp_min(0).sqrt()


def cir():
    sde = CIR()
    # From x_0 ~ Gamma(shape k, scale 1) with k = 2ab/c^2, x_t is Gamma(k, scale(t)).
    shape = 2 * sde.a * sde.b / sde.c**2

    def scale(t):
        return torch.exp(-sde.a * t) - sde.c**2 / (2 * sde.a) * torch.expm1(-sde.a * t)

    def score(x, t):
        return (shape - 1) / x - 1 / scale(t)

    data = torch.distributions.Gamma(shape, 1.0).sample((20_000, 1))
    up = torch.linspace(0, sde.T, 201)
    noise = integrate(sde, data, up, EulerMaruyama(), seed=1).x
    # Where the noise depends on the state, undoing it takes div(g g^T) as well: reverse knows.
    back = integrate(reverse(sde, score), noise, up.flip(0), EulerMaruyama(), seed=2).x
    flow = integrate(probability_flow(sde, score), noise, up.flip(0), "torchdiffeq_dopri5").x

    print(f"\n{sde}: mean, standard deviation, skewness")
    show("x_0, exactly", shape, math.sqrt(shape), 2 / math.sqrt(shape))
    show("x_0, drawn", *moments(data))
    end = scale(up[-1]).item()
    show("x_T, exactly", shape * end, math.sqrt(shape) * end, 2 / math.sqrt(shape))
    show("x_T, run forward", *moments(noise))
    show("x_0, reverse", *moments(back))
    show("x_0, probability_flow", *moments(flow))


def moments(x):
    z = (x - x.mean()) / x.std()
    return x.mean().item(), x.std().item(), (z**3).mean().item()


def show(what, mean, std, skewness):
    print(f"  {what:22s}{mean:7.3f}{std:7.3f}{skewness:7.3f}")


if __name__ == "__main__":
    torch.manual_seed(0)
    trig_flow()
    cir()
