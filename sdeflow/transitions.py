"""The law of a linear SDE with matrices over a time: Phi, m and P, without cancellation.

    Phi' = F Phi,   m' = F m + c,   P' = F P + P F^T + Q

Constant matrices: a Taylor series over a short time, then doubling, P <- Phi P Phi^T + P; matrices
that change in time: panels of quadrature. Both keep each component of P to rounding, where one
exponential of a block matrix (Van Loan, 1978) loses the small ones.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import ArgumentError
from .quadrature import TOLERANCE, Panels, Values, tails, variation, weighted

TERMS = 23
"""Of the Taylor series, where the norm of F t is at most 1/4: the rest is below 1e-30."""


class Transition(NamedTuple):
    """The Gaussian law of X_t given X_s = x: mean matrix x + offset, and covariance."""

    matrix: Tensor
    """Phi(t, s), (*t.shape, d, d)."""
    offset: Tensor
    """m, (*t.shape, d)."""
    covariance: Tensor
    """P, (*t.shape, d, d)."""


# ---- constant matrices


def constant_transition(F: Tensor, c: Tensor, Q: Tensor, t: Tensor) -> Transition:
    """The transition over a time t >= 0 (any shape) for constant F, c and Q = G G^T.

    The Taylor series at t/2^k, where the norm of F t/2^k is at most 1/4, then k doublings, which
    only add where nothing truly cancels. Source: Van Loan (1978) for the problem; Stillfjord &
    Tronarp (2023) for doubling.
    """
    norm = float(F.detach().abs().sum(-1).max() * t.detach().max()) if t.numel() else 0.0
    if not math.isfinite(norm):
        raise ArgumentError("F and t must be finite; F t has an infinite or NaN norm")
    doublings = max(0, math.ceil(math.log2(4 * norm))) if norm else 0
    h = (t / 2**doublings)[..., None, None]
    eye = torch.eye(F.shape[-1], dtype=F.dtype, device=F.device)
    term, push, spread = eye.expand(*t.shape, *eye.shape), h * c.unsqueeze(-1), h * Q
    matrix, offset, covariance = term, push, spread
    for k in range(1, TERMS):
        term, push = (h / k) * (F @ term), (h / (k + 1)) * (F @ push)
        half = F @ spread
        spread = (h / (k + 1)) * (half + half.mT)
        matrix, offset, covariance = matrix + term, offset + push, covariance + spread
    law = (matrix, offset, covariance)
    for _ in range(doublings):
        law = compose(law, law)
    return transition(*law)


def compose(first: Values, second: Values) -> tuple[Tensor, Tensor, Tensor]:
    """The transition that is `first` and then `second`."""
    (phi, m, p), (psi, n, q) = first, second
    return psi @ phi, psi @ m + n, psi @ p @ psi.mT + q


# ---- matrices that change in time


class MatrixPanels(Panels):
    """(Phi, m, P) over panels, from (F, c, Q); m and c are (d, k), and Q is any symmetric matrix.

    U(u), the matrix from u to the panel's end, solves U = 1 + INT_u U F; with it m = INT U c and
    P = INT U Q U^T (in |du|, also for panels that run down).
    """

    def panel(self, values: Values, a: Tensor, b: Tensor) -> Values:
        F, c, Q = values[:3]
        h = b - a
        eye = torch.eye(F.shape[-1], dtype=F.dtype, device=F.device)
        U = term = eye.expand_as(F)
        for _ in range(20):  # 1/20! is below rounding where the norm of F h is at most 1
            term = tails(term @ F, h)
            U = U + term
            if float(term.detach().abs().max()) < 1e-18:
                break
        return eye + weighted(U @ F, h), weighted(U @ c, h), weighted(U @ Q @ U.mT, h.abs())

    def compose(self, first: Values, second: Values) -> Values:
        return compose(first, second)

    def rounding(self, values: Values, a: Tensor, b: Tensor) -> Tensor:
        """(K,) what rounding does to a panel's transition: that of the nodes' times."""
        return 4 * torch.finfo(a.dtype).eps * b.abs() * variation(values[0]).sum((1, 2))

    def agree(self, whole: Values, halves: Values, values: Values, a: Tensor, b: Tensor) -> Tensor:
        F, c, Q = values[:3]
        (phi, m, p), (phi2, m2, p2) = whole, halves
        h = (b - a).abs()
        eps = 4 * torch.finfo(F.dtype).eps * b.abs()
        room = TOLERANCE + self.rounding(values, a, b)

        def largest(v: Tensor) -> Tensor:
            return v.abs().flatten(1).amax(1)

        deviation = p2.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
        scale = deviation.unsqueeze(2) * deviation.unsqueeze(1)
        slack = 2 * room[:, None, None] * scale + eps[:, None, None] * variation(Q)
        good = F.abs().sum(-1).amax((1, 2)) * h <= 1
        good &= largest(phi - phi2) <= room * largest(phi2)
        good &= largest(m - m2) <= room * (largest(m2) + h * largest(c)) + eps * largest(
            variation(c)
        )
        return good & ((p - p2).abs() <= slack).all(-1).all(-1)


class Clock(Panels):
    """INT b over panels."""

    def panel(self, values: Values, a: Tensor, b: Tensor) -> Values:
        return (weighted(values[0], b - a),)

    def compose(self, first: Values, second: Values) -> Values:
        return (first[0] + second[0],)

    def agree(self, whole: Values, halves: Values, values: Values, a: Tensor, b: Tensor) -> Tensor:
        eps = 4 * torch.finfo(a.dtype).eps * b.abs()
        room = TOLERANCE * halves[0].abs() + eps * variation(values[0])
        return (whole[0] - halves[0]).abs() <= room


# ---- roots of covariances


def cholesky(covariance: Tensor, t: Tensor | float) -> Tensor:
    """The lower factor of a covariance at time t, or an error where it is singular."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed.any():
        raise ArgumentError(
            f"the covariance is singular at t={t!r}, and its kernel has no density there: take "
            "t > 0, and let the noise reach every component (through G, F, or `start`)"
        )
    return factor


def root(covariance: Tensor) -> Tensor:
    """A lower-triangular root, where some directions may have no noise at all."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if not failed.any():
        return factor
    columns: list[Tensor] = []
    rest = covariance
    for i in range(covariance.shape[-1]):
        pivot = rest[..., i, i, None].clamp_min(0)
        tiny = 1e-14 * covariance[..., i, i, None]
        column = torch.where(pivot > tiny, rest[..., i] / pivot.clamp_min(1e-300).sqrt(), 0.0)
        rest = rest - column.unsqueeze(-1) * column.unsqueeze(-2)
        columns.append(column)
    return torch.stack(columns, -1).tril()


def transition(phi: Tensor, m: Tensor, p: Tensor) -> Transition:
    return Transition(phi, m.squeeze(-1), (p + p.mT) / 2)
