"""The engine of multistep samplers: an exact integral, and a polynomial under it.

With lambda = log(alpha/sigma), rho = sigma/alpha, theta = atan(rho), r^2 = alpha^2 + sigma^2 and
tau = eta, the step from t to s is, exactly:

    data   x_s = (sigma_s/sigma_t) e^{-tau^2 h} x_t + INT D dw + sigma_s sqrt(1 - e^{-2 tau^2 h}) z,
           w(lambda) = alpha_s e^{-(1 + tau^2)(lambda_s - lambda)},  h = lambda_s - lambda_t
    noise  x_s = (alpha_s/alpha_t) x_t + alpha_s INT eps drho                        (tau = 0)
    v      x_s = (r_s/r_t) x_t + r_s INT v dtheta,  v = (alpha eps - sigma D)/r      (tau = 0)

D, eps or v is replaced by the polynomial through its last values in a chosen variable, and the
integral is done by quadrature to rounding. Prediction, variable, number of points and a corrector:
these four settings make most multistep samplers of the literature.
Source: Zhang & Chen (2023, DEIS), eq. 15; Lu et al. (2022b, DPM-Solver++), eq. 8, 9; Zhao et al.
(2023, UniPC), algorithms 1, 2; Xue et al. (2023, SA-Solver), eq. 11 to 17.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdeflow.errors import ArgumentError, one_of, positive_int
from sdeflow.noise import Noise
from sdeflow.plugins import hookimpl
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import GaussianSDE, match
from sdeflow.solver import Memory, StepSolver

from .dpmpp import exponential_euler, predicted_noise, third_order
from .ends import check_ends, needs_of, order_of, values_in_use

PREDICTIONS = ("data", "noise", "v")
VARIABLES = ("log_snr", "rho", "time", "angle")


class Value(NamedTuple):
    """What the network said, D, eps or v, and where in the polynomial's variable it said so."""

    place: Tensor
    value: Any


@dataclass(frozen=True)
class Multistep(StepSolver):
    """A multistep exponential integrator, predictor and corrector, of any order.

    prediction: what the polynomial stands for: "data", "noise" or "v". The noise of an SDE
        (eta > 0) goes with "data" alone.
    variable: what it is a polynomial in: "log_snr" (lambda), "rho", "time" or "angle".
    points: values that the predictor uses, its order.
    corrector: values that the corrector uses, the new one among them; 0 for none. It costs no
        evaluation: the step is repeated with the value found at its end.
    start, last, reach: see `ends`. With a corrector "grow" loses one order less; the corrector of a
        step that was lowered uses one value more than its predictor.
    line: how two values are used: "exact", their line is integrated; "middle", it is taken at the
        middle of the step, as in DPM-Solver++ 2M and the published UniPC-2: the order is the same,
        large steps are damped.
    band: where sigma/alpha is outside, at either end of a step, the process runs without noise.
    A step to sigma = 0, or from alpha = 0, is DDIM's where D or the variable has no end there.
    """

    prediction: str = "data"
    variable: str = "log_snr"
    points: int = 2
    corrector: int = 0
    start: str = "grow"
    line: str = "exact"
    last: str = "auto"
    reach: float = 2.0
    band: tuple[float, float] = (0.0, math.inf)

    evaluations = 1

    def __post_init__(self) -> None:
        one_of("prediction", self.prediction, PREDICTIONS)
        one_of("variable", self.variable, VARIABLES)
        one_of("line", self.line, ("exact", "middle"))
        check_ends(self.start, self.last, self.reach)
        positive_int("points", self.points)
        if self.corrector != 0:
            positive_int("corrector", self.corrector)
        if not 0 <= self.band[0] < self.band[1]:
            raise ArgumentError(f"band={self.band!r} must be two levels of sigma/alpha, low < high")

    @property
    def order(self) -> int:  # type: ignore[override]
        """The order on the probability flow: the predictor's, or one more with a corrector; at
        most 2 with last="lower", 4 with start="single"."""
        best = min(max(self.points, self.corrector), self.points + 1)
        return order_of(best, self.start, self.last)

    @property
    def weak_order(self) -> int | None:  # type: ignore[override]
        """At most 2: D along a path of an SDE is not smooth."""
        return None if "ode" in self.needs else min(2, self.order)

    @property
    def point_exact(self) -> bool:  # type: ignore[override]
        """True but for v, which turns along the path of a point."""
        return self.prediction != "v"

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        noisy, single = self.prediction == "data", self.variable == "time"
        own = ("gaussian", *(() if noisy else ("ode",)), *(("one alpha",) if single else ()))
        return needs_of(self.start, own)

    def init(self, process: ReverseSDE, x: Tensor, ts: Tensor) -> Memory:
        return (), None, len(ts) - 1

    def step(
        self, process: ReverseSDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        past, predictor, left = memory
        sde, data = process.gaussian, process.denoise(x, t)
        value = Value(_place(self.variable, sde, t), _predicted(self.prediction, sde, x, data, t))
        past = (value, *past)
        if predictor is not None:  # the last step again, by what it changes
            before, weights, points = predictor
            earlier = self._within(process, before, t)
            again = self._weights(earlier, before, t, past[:points])
            x = x + weighted(again, past, x, t) - weighted(weights, past[1:], x, t)
        process = self._within(process, t, s)
        if not self._begins(sde, t, value):
            mean, std = exponential_euler(process, x, data, t, s)
            moved = mean if process.deterministic else mean + std * noise(t, s)
            return moved, ((), None, left - 1)
        kept = past[: max(self.points, self.corrector - 1) if self.corrector else self.points - 1]
        if self.start == "single" and len(past) < self.points:
            return third_order(process, x, data, t, s), (kept, None, left - 1)
        points = self._points(sde, s, past, left)
        weights = self._weights(process, t, s, past[:points])
        moved = self._carried(process, x, t, s, noise) + weighted(weights, past, x, s)
        lowered = points < min(self.points, len(past))
        points = min(self.corrector, points + 1) if lowered else self.corrector
        return moved, (kept, (t, weights, points) if points else None, left - 1)

    def _begins(self, sde: GaussianSDE, t: Tensor, value: Value) -> bool:
        """Whether a polynomial can begin at t: not in the middle of nothing, at alpha = 0."""
        turns = self.prediction == "v"
        return all_true(value.place.isfinite()) and (turns or all_true(sde.alpha(t) != 0))

    def _points(self, sde: GaussianSDE, s: Tensor, past: Sequence[Value], left: int) -> int:
        """How many values the predictor uses in the step to s."""
        points, end = min(self.points, len(past)), _place(self.variable, sde, s)
        if not all_true(end.isfinite()):
            return 1
        if self.prediction == "data" and not all_true(sde.sigma(s) != 0):
            return 1
        behind = past[0].place - past[1].place if len(past) > 1 else None
        return values_in_use(points, left, self.last, self.reach, end - past[0].place, behind)

    def _within(self, process: ReverseSDE, t: Tensor, s: Tensor) -> ReverseSDE:
        """The process, its noise switched off where the step is outside the band."""
        low, high = self.band
        if process.deterministic or (low == 0 and high == math.inf):
            return process
        ends = [process.gaussian.sigma(u) / process.gaussian.alpha(u) for u in (t, s)]
        inside = all(all_true((rho >= low) & (rho <= high)) for rho in ends)
        return process if inside else replace(process, eta=0.0)

    def _carried(
        self, process: ReverseSDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise
    ) -> Tensor:
        """What of x_t, and of the noise, is in x_s."""
        (a_t, s_t), (a_s, s_s) = process.gaussian.kernel(x, t), process.gaussian.kernel(x, s)
        if self.prediction == "noise":
            return a_s / a_t * x
        if self.prediction == "v":
            return torch.hypot(a_s, s_s) / torch.hypot(a_t, s_t) * x
        kept, std = exponential_euler(process, x, 0.0 * x, t, s)
        return kept if process.deterministic else kept + std * noise(t, s)

    def _weights(
        self, process: ReverseSDE, t: Tensor, s: Tensor, values: Sequence[Value]
    ) -> list[Tensor]:
        """What each value weighs in the integral of their polynomial from t to s."""
        total = _total(self.prediction, process, t, s)
        if len(values) == 1:
            return [total]
        places = [value.place for value in values]
        if len(values) == 2 and self.line == "middle":
            middle = sum(_place(self.variable, process.gaussian, u) for u in (t, s)) / 2
            share = (middle - places[0]) / (places[1] - places[0])
            return [total * (1 - share), total * share]
        lam, kernel = _density(self.prediction, self.variable, process, t, s)
        u = _place_of_lambda(self.variable, process.gaussian, lam)
        return polynomial_weights(total, kernel, u, places)


def weighted(weights: Sequence[Tensor], values: Sequence[Value], x: Tensor, t: Tensor) -> Any:
    """The sum of the values, as many as there are weights at time t."""
    terms = [match(w, x, t) * v.value for w, v in zip(weights, values, strict=False)]
    return functools.reduce(operator.add, terms)


def all_true(each: Tensor) -> bool:
    """Whether all of them are; told on the host, from times alone."""
    return bool(each.all())


def _predicted(prediction: str, sde: GaussianSDE, x: Tensor, data: Tensor, t: Tensor) -> Tensor:
    """D, eps or v at x, from D."""
    if prediction == "data":
        return data
    a, s = sde.kernel(x, t)
    eps = predicted_noise(sde, x, data, t)
    return eps if prediction == "noise" else (a * eps - s * data) / torch.hypot(a, s)


def _place(variable: str, sde: GaussianSDE, t: Tensor) -> Tensor:
    """The polynomial's variable at time t."""
    if variable == "time":
        return t
    a, s = sde.alpha(t), sde.sigma(t)
    if variable == "log_snr":
        return a.log() - s.log()
    return s / a if variable == "rho" else torch.atan2(s, a)


def _place_of_lambda(variable: str, sde: GaussianSDE, lam: Tensor) -> Tensor:
    """The same where lambda = log(alpha/sigma) is given."""
    if variable == "time":
        return sde.time_of_log_snr(2 * lam)
    if variable == "log_snr":
        return lam
    return torch.exp(-lam) if variable == "rho" else torch.atan(torch.exp(-lam))


# ---- integrals


@functools.cache
def gauss() -> tuple[Tensor, Tensor]:
    """Nodes and weights of 24-point Gauss quadrature on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(24)
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)


def spread(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The nodes between t and s, (*, 24), and what each counts."""
    xi, mass = gauss()
    h = (s - t).unsqueeze(-1)
    return t.unsqueeze(-1) + h * xi, h * mass


def _total(prediction: str, process: ReverseSDE, t: Tensor, s: Tensor) -> Tensor:
    """The whole of dw from t to s."""
    sde = process.gaussian
    (a_t, s_t), (a_s, s_s) = ((sde.alpha(u), sde.sigma(u)) for u in (t, s))
    if prediction == "data":
        return -a_s * torch.expm1(-(1 + process.eta**2) * (sde.log_snr(s) - sde.log_snr(t)) / 2)
    if prediction == "noise":
        return s_s - a_s * s_t / a_t
    return torch.hypot(a_s, s_s) * (torch.atan2(s_s, a_s) - torch.atan2(s_t, a_t))


def _density(
    prediction: str, variable: str, process: ReverseSDE, t: Tensor, s: Tensor
) -> tuple[Tensor, Tensor]:
    """Nodes in lambda from t to s, and the part of dw at each, (*, 24) both.

    The nodes are spread over lambda if that is the variable or the prediction is D; else over rho
    or theta, of which dw is made, and which reach to sigma = 0.
    """
    sde = process.gaussian
    a_s, s_s = sde.alpha(s), sde.sigma(s)
    scale = torch.hypot(a_s, s_s) if prediction == "v" else a_s
    if prediction == "data" or variable == "log_snr":
        start, end = (_place("log_snr", sde, u) for u in (t, s))
        lam, mass = spread(start, end)
        if prediction == "data":
            rate = 1 + process.eta**2
            rise = rate * torch.exp(rate * (lam - end.unsqueeze(-1)))
        else:
            rise = -torch.exp(-lam) if prediction == "noise" else -0.5 / torch.cosh(lam)
        return lam, scale.unsqueeze(-1) * rise * mass
    native = "rho" if prediction == "noise" else "angle"
    place, mass = spread(*(_place(native, sde, u) for u in (t, s)))
    rho = place if prediction == "noise" else torch.tan(place)
    return -rho.log(), scale.unsqueeze(-1) * mass


def polynomial_weights(
    total: Tensor, kernel: Tensor, u: Tensor, places: Sequence[Tensor]
) -> list[Tensor]:
    """What each value weighs in the integral of the polynomial through `places`: INT l_j dw.

    kernel, u: the part of dw, and the variable, at each node, (*, 24). The first weight is what
    the others leave of the total, so that a constant is integrated without error.
    """
    at = torch.stack(tuple(places), -1)  # (*, k)
    above = u.unsqueeze(-2).unsqueeze(-2) - at.unsqueeze(-1).unsqueeze(-3)  # (*, 1, k, 24)
    below = at.unsqueeze(-1) - at.unsqueeze(-2)  # (*, k, k)
    own = torch.eye(len(places), dtype=torch.bool).unsqueeze(-1)
    lagrange = (above / below.unsqueeze(-1)).masked_fill(own, 1.0).prod(-2)  # (*, k, 24)
    weights = (kernel.unsqueeze(-2) * lagrange[..., 1:, :]).sum(-1).unbind(-1)
    return [total - sum(weights), *weights]


def exponential_adams(prediction: str = "data", points: int = 2, **options: Any) -> Multistep:
    """Exponential Adams-Bashforth on "data", "noise" or "v" (in the angle); no corrector."""
    return Multistep(prediction, "angle" if prediction == "v" else "log_snr", points, **options)


@hookimpl
def sdeflow_solvers() -> dict[str, Callable[..., Any]]:
    return {
        f"eab_{prediction}_{k}": functools.partial(exponential_adams, prediction, k)
        for prediction in PREDICTIONS
        for k in (2, 3)
    }
