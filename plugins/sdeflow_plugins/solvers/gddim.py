"""Generalised DDIM: diffusion solvers for linear systems, such as critically damped Langevin.

With kernel p(x_t | x_0) = N(mu_t(x_0), P_t) and P = L L^T, a step keeps the predicted data D and
turns the whitened rest:

    x_s = mu_s(D) + L_s (O L_t^{-1} (x_t - mu_t(D)) + C z),      O O^T + C C^T = 1

where mu_t(D) = x_t + P_t score(x_t, t), and L_s O L_t^{-1} is the flow of F + (1 + eta^2)/2 G G^T
P^{-1}. On the probability flow O is a rotation, and the R_t of the paper is L_t O: dR/dt =
(F + G G^T P^{-1}/2) R, R R^T = P. With one component it is DPM-Solver++ 1S
(DDIM at eta = 0 and 1). The grid "quadratic" suits it.
Source: Zhang, Tao & Chen (2022), gDDIM: Generalized denoising diffusion implicit models.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdeflow.errors import GridError
from sdeflow.noise import Noise
from sdeflow.plugins import hookimpl
from sdeflow.quadrature import Values
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import as_time
from sdeflow.solver import Memory, StepSolver
from sdeflow.system import LinearSystem, apply, shaped
from sdeflow.transitions import MatrixPanels, cholesky


@dataclass(frozen=True)
class GDDIM(StepSolver):
    """Generalised DDIM: one step for each evaluation of the score, any eta.

    First order; exact for one-point data, at any eta on any grid. It asks for the whole score,
    where the process itself reads G^T score alone. A step to t = 0 returns E[X_0 | x_t].
    Source: Zhang, Tao & Chen (2022), propositions 4 and 6.
    """

    order = 1
    weak_order = 1
    evaluations = 1
    needs = ("system",)

    def init(self, process: ReverseSDE, x: Tensor, ts: Tensor) -> Memory:
        return {"step": 0, "tables": tables(process, ts)}

    def step(
        self, process: ReverseSDE, x: Tensor, t: Tensor, s: Tensor, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        k, table = memory["step"], memory["tables"]
        law = {name: values[k] for name, values in table.items()}
        mean = x + apply(law["covariance"], process.score(x, as_time(t)))
        there = apply(law["back"], mean - shaped(law["offset"], mean))
        out = there + self.correction(law, mean, t, memory)
        if s > 0:
            out = out + apply(law["turn"], x - mean)
            if not process.deterministic:
                out = out + apply(law["spread"], _normals(process, noise, t, s, x))
        return out, {"step": k + 1, "tables": table, "before": (t, mean)}

    def correction(self, law: dict[str, Tensor], mean: Tensor, t: Tensor, memory: Memory) -> Any:
        """What a change of the predicted data over the step adds; at first order nothing."""
        return 0.0


@dataclass(frozen=True)
class GDDIM2M(GDDIM):
    """Generalised DDIM of second order: the predicted data extrapolated from the last two.

    D is linear in t over a step, and the exponential integrals are exact; order 2 on the
    probability flow, weak order 2 at any eta. Exact for one-point data. The first step, and a step
    to t = 0, is of first order. What DPM-Solver++ 2M is for a Gaussian SDE.
    """

    order = 2
    weak_order = 2

    def correction(self, law: dict[str, Tensor], mean: Tensor, t: Tensor, memory: Memory) -> Any:
        if "before" not in memory:
            return 0.0
        t_before, before = memory["before"]
        carried = apply(law["carry"], before - shaped(law["carry_offset"], before))
        return apply(law["slope"], (mean - carried) / (t - t_before))


def tables(process: ReverseSDE, ts: Tensor) -> dict[str, Tensor]:
    """The matrices of all steps of a decreasing grid t_0 > t_1 > ... (or an increasing one).

    For step k, from t to s: covariance P_t; back, offset: mu_s(D) = back (mu_t(D) - offset);
    turn L_s O L_t^{-1}; spread L_s C; slope: mu_s changes by slope Phi_t D' where D moves by D' in
    time; carry, carry_offset: what `back` and `offset` were for the step before.
    """
    sde, eta = process.forward, process.eta
    assert isinstance(sde, LinearSystem)
    if ts[0] == 0:
        raise GridError("ts begins at t = 0, where the kernel is singular; begin at t_min > 0")
    ends = ts[ts > 0]
    matrix, offset, covariance = sde.kernel_at(ts)
    whitened = _Whitened(sde, eta)
    turns, spreads, slopes = (torch.zeros_like(covariance[1:]) for _ in range(3))
    if len(ends) > 1:
        root = cholesky(covariance[ts > 0], ends)
        for k, (turn, integral, spread) in enumerate(whitened.along(ends)):
            L_t, L_s = root[k], root[k + 1]
            turns[k] = L_s @ torch.linalg.solve_triangular(L_t, turn, upper=False, left=False)
            spreads[k] = L_s @ torch.linalg.cholesky(spread) if eta else 0.0
            frozen = matrix[k + 1] * (ends[k + 1] - ends[k])
            slopes[k] = torch.linalg.solve(matrix[k], frozen - L_s @ integral, left=False)
    back = torch.linalg.solve(matrix[:-1], matrix[1:], left=False)
    push = offset[:-1] - torch.linalg.solve(back, offset[1:])
    return {
        "covariance": covariance[:-1],
        "back": back,
        "offset": push,
        "turn": turns,
        "spread": spreads,
        "slope": slopes,
        "carry": torch.cat((back[:1], back[:-1])),
        "carry_offset": torch.cat((push[:1], push[:-1])),
    }


class _Whitened(MatrixPanels):
    """The flow of F + (1 + eta^2)/2 G G^T P^{-1} in the coordinates L^{-1} x, P = L L^T.

    There it is K = f + (1 + eta^2)/2 q - low(f + f^T + q), f = L^{-1} F L, q = L^{-1} G G^T L^{-T},
    low taking the part below the diagonal and half the diagonal: L' = L low(L^{-1} P' L^{-T}). At
    eta = 0 it is skew. The integrals are of L^{-1} Phi and of eta^2 q.
    """

    def __init__(self, sde: LinearSystem, eta: float) -> None:
        super().__init__(self.whiten)
        self.sde, self.eta = sde, eta

    def whiten(self, t: Tensor) -> Values:
        F, _, Q = self.sde.coefficients(t)
        matrix, _, covariance = self.sde.kernel_at(t)
        L = cholesky(covariance, t)

        def from_left(v: Tensor) -> Tensor:
            return torch.linalg.solve_triangular(L, v, upper=False)

        eye = torch.eye(L.shape[-1], dtype=L.dtype)
        condition = (from_left(eye.expand_as(L)).abs() @ L.abs()).sum(-1).amax(-1)
        f = from_left(F @ L)
        q = from_left(from_left(Q).mT)
        change = f + f.mT + q
        low = change.tril() - change.diagonal(dim1=-2, dim2=-1).diag_embed() / 2
        K = f + (1 + self.eta**2) / 2 * q - low
        return K, from_left(matrix), self.eta**2 * q, condition

    def rounding(self, values: Values, a: Tensor, b: Tensor) -> Tensor:
        """As well, that of P, whose factor L feels it by the square of its condition."""
        K, condition = values[0], values[3]
        noise = condition.amax(1) ** 2 * K.abs().sum(-1).amax((1, 2)) * (b - a).abs()
        return super().rounding(values, a, b) + 4 * torch.finfo(a.dtype).eps * noise

    def along(self, ts: Tensor) -> Iterator[Values]:
        """(O, INT_t^s O(s, u) L^{-1} Phi du, 1 - O O^T) from each t of a grid to the next s."""
        knots = self.refine(ts.sort().values)
        knots = knots if ts[0] < ts[-1] else knots.flip(0)
        each, _ = self.solve(knots[:-1], knots[1:])
        place = torch.isin(knots, ts).nonzero().flatten().tolist()
        for begin, end in itertools.pairwise(place):
            parts = (tuple(v[k] for v in each) for k in range(begin, end))
            yield functools.reduce(self.compose, parts)


def _normals(process: ReverseSDE, noise: Noise, t: Tensor, s: Tensor, x: Tensor) -> Tensor:
    """Unit normals of the shape of x (B, d, *), from a source of (B, m, *): a part of the step for
    each m of them."""
    count = -(-x.shape[1] // process.noise_shape(x)[1])
    cuts = torch.lerp(t, s, torch.arange(count + 1, dtype=t.dtype) / count)
    cuts[-1] = s
    parts = [noise(cuts[k], cuts[k + 1]) for k in range(count)]
    return torch.cat(parts, 1)[:, : x.shape[1]]


@hookimpl
def sdeflow_solvers() -> dict[str, Callable[..., Any]]:
    return {"gddim": GDDIM, "gddim_2m": GDDIM2M}
