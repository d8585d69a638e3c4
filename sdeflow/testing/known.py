"""Eight SDEs whose solution is known path by path: `KNOWN`, to measure strong orders on.

The first seven are those of the SciML problem library (SDEProblemLibrary.jl), numbers included; the
eighth, whose noise does not commute, is our own. All are on 0 <= t <= 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..noise import Noise, area
from ..nonlinear import GBM
from ..sde import SDE


@dataclass(frozen=True)
class Cubic(SDE):
    """dx = -1/4 x (1 - x^2) dt + 1/2 (1 - x^2) dw; x = tanh(w/2 + atanh x_0)."""

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return -0.25 * x * (1 - x * x)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * (1 - x * x)


@dataclass(frozen=True)
class Wave(SDE):
    """dx = -1/100 sin x cos^3 x dt + 1/10 cos^2 x dw; x = atan(w/10 + tan x_0)."""

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return -0.01 * x.sin() * x.cos() ** 3

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.1 * x.cos() ** 2


@dataclass(frozen=True)
class Additive(SDE):
    """dx = (b/sqrt(1 + t) - x/(2 (1 + t))) dt + a b/sqrt(1 + t) dw; a, b numbers, one a component.

    x = (x_0 + b (t + a w)) / sqrt(1 + t).
    """

    a: tuple[float, ...] = (0.1,)
    b: tuple[float, ...] = (0.05,)
    additive: ClassVar[bool] = True

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return x.new_tensor(self.b) / (1 + t).sqrt() - x / (2 * (1 + t))

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return x.new_tensor(self.a) * x.new_tensor(self.b) / (1 + t).sqrt()

    def solution(self, x0: Tensor, t: Tensor, w: Tensor) -> Tensor:
        """x_t from W_t."""
        a, b = w.new_tensor(self.a), w.new_tensor(self.b)
        return (x0 + b * (t + a * w)) / (1 + t).sqrt()


@dataclass(frozen=True)
class StratonovichLinear(SDE):
    """dx = 1.01 x dt + 0.87 x o dw, in the Stratonovich sense; x = x_0 exp(1.01 t + 0.87 w)."""

    calculus: ClassVar[Literal["ito", "stratonovich"]] = "stratonovich"

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return 1.01 * x

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.87 * x


@dataclass(frozen=True)
class Heisenberg(SDE):
    """dX = a X dt + (b + N_1) X o dw_1 + N_2 X o dw_2 in R^3, N_1 = e_1 e_2^T, N_2 = e_2 e_3^T.

    Linear noise that does not commute: [N_1, N_2] = e_1 e_3^T. In the Stratonovich sense; the Ito
    drift is (a + (b + N_1)^2/2) X. The solution is a number times that on the Heisenberg group,
    with the Levy area A_21 of the path:

        e^{-a t - b w_1} X = (x + y w_1 + z (w_1 w_2/2 + A_21), y + z w_2, z)
    """

    a: float = -0.5
    b: float = 0.3
    noise: ClassVar[Literal["elementwise", "scalar", "matrix"]] = "matrix"
    calculus: ClassVar[Literal["ito", "stratonovich"]] = "stratonovich"

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return self.a * x

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        b = self.b
        rows = ((b, 0, 0, 0, 0, 0), (1, 0, b, 0, 0, 0), (0, 0, 0, 1, b, 0))  # of x_j: (i, k)
        return (x @ x.new_tensor(rows)).reshape(-1, 3, 2)

    def solution(self, x0: Tensor, t: Tensor, w: Tensor, area: Tensor) -> Tensor:
        """x_t from W_t (B, 2) and the Levy areas A_t (B, 2, 2)."""
        (x, y, z), (w1, w2) = x0.unbind(-1), w.unbind(-1)
        double = w1 * w2 / 2 + area[..., 1, 0]
        free = torch.stack((x + y * w1 + z * double, y + z * w2, z + 0 * w1), -1)
        return torch.exp(self.a * t + self.b * w1).unsqueeze(-1) * free


@dataclass(frozen=True, eq=False)
class Known:
    """An SDE with the state it starts from at t = 0, and x_t as a function of the Wiener path.

    sde: the SDE. start: x_0 of one sample, float64.
    solution: (x_0, t, w) -> x_t from W_t, of the shape of one Wiener increment; with `levy`,
        (x_0, t, w, A) -> x_t, A_kl = 1/2 INT (W_k dW_l - W_l dW_k), (B, m, m).
    """

    sde: SDE
    start: Tensor
    solution: Callable[..., Tensor]
    levy: bool = False

    def x0(self, batch: int) -> Tensor:
        """The start of a batch, (B, *)."""
        return self.start.expand(batch, *self.start.shape).clone()

    def exact(self, noise: Noise, ts: Tensor) -> Tensor:
        """x at ts[-1], (B, *), from the path that the noise source shows along ts.

        Exact on any grid from ts[0] = 0, but where it needs the Levy areas: those are known up to a
        variance of h/20 in each interval of length h, given W and its space-time areas there.
        Give a grid fine beside the steps under test, whose error has a variance of h/4.
        Source: Foster, Lyons & Oberhauser (2020), for the areas.
        """
        w: Any = 0.0
        levy: Any = 0.0
        for t, s in zip(ts[:-1], ts[1:], strict=True):
            root = (s - t).abs().sqrt()
            dw = root * noise(t, s)
            if self.levy:
                mean = w / 2 + root * area(noise, t, s) / math.sqrt(12)
                turn = mean.unsqueeze(-1) * dw.unsqueeze(-2)
                levy = levy + turn - turn.mT
            w = w + dw
        x0 = self.start.to(w)
        return self.solution(x0, ts[-1], w, levy) if self.levy else self.solution(x0, ts[-1], w)


def _start(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _growth(x0: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return x0 * torch.exp((1.01 - 0.87**2 / 2) * t + 0.87 * w)


_SYSTEM = Additive((0.1, 0.1, 0.1, 0.1), (0.5, 0.25, 0.125, 0.1115))

KNOWN: dict[str, Known] = {
    "linear": Known(GBM(1.01, 0.87), _start(0.5), _growth),
    "linear_2d": Known(GBM(1.01, 0.87), torch.full((4, 2), 0.5).double(), _growth),
    "cubic": Known(Cubic(), _start(0.5), lambda x0, t, w: torch.tanh(w / 2 + x0.atanh())),
    "wave": Known(Wave(), _start(1.0), lambda x0, t, w: torch.atan(0.1 * w + x0.tan())),
    "additive": Known(Additive(), _start(1.0), Additive().solution),
    "additive_system": Known(_SYSTEM, _start(1.0, 1.0, 1.0, 1.0), _SYSTEM.solution),
    "stratonovich_linear": Known(
        StratonovichLinear(), _start(0.5), lambda x0, t, w: x0 * torch.exp(1.01 * t + 0.87 * w)
    ),
    "noncommutative": Known(Heisenberg(), _start(1.0, 1.0, 1.0), Heisenberg().solution, True),
}
"""The eight problems by name; the 2-D linear one has a state of shape (4, 2)."""
