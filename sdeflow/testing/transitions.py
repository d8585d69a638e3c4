"""A linear system's kernel against the moment equations of its drift and diffusion."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..reverse import ReverseSDE
from ..sde import SDE
from ..system import LinearSystem
from .contract import Group, Pair, agree, gap, moments
from .report import Check
from .system import GaussianSystemData

DOUBLE = torch.float64


def transitions(sde: LinearSystem, shape: tuple[int, ...]) -> Iterator[Group]:
    """The checks of a linear system, by group."""
    yield "moments", lambda: _moments(sde, shape)
    yield "perturb", lambda: [_system_perturb(sde, shape)]
    yield "reversal", lambda: [_system_reversal(sde, shape, eta) for eta in (0.0, 0.5, 1.0)]


def _linear(sde: SDE, shape: tuple[int, ...], t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """F, c and G G^T, read off drift and diffusion."""
    d = shape[0]
    units = torch.eye(d, dtype=DOUBLE).reshape(d, d, *[1] * (len(shape) - 1)).expand(d, *shape)
    c = sde.drift(torch.zeros_like(units), t)
    first = (slice(None),) * 2 + (0,) * (len(shape) - 1)
    F = (sde.drift(units, t) - c)[first].mT
    only = torch.zeros_like(units)
    only[first] = torch.eye(d, dtype=DOUBLE)
    return F, c[first][0], sde.covariance_product(units, t, only)[first].mT


def _moments(sde: LinearSystem, shape: tuple[int, ...]) -> list[Check]:
    """Phi' = F Phi, m' = F m + c, P' = F P + P F^T + G G^T, by differences of fourth order."""
    rows: dict[str, list[tuple[Tensor, Tensor, float]]] = {
        "mean map": [],
        "offset": [],
        "covariance": [],
    }
    worst, when = math.inf, 0.0
    for t in moments(sde):
        h = 1e-3 * float(t)
        at = [sde.transition(t + k * h) for k in (-2, -1, 1, 2)]
        slopes = [(p[0] - 8 * p[1] + 8 * p[2] - p[3]) / (12 * h) for p in zip(*at, strict=True)]
        phi, m, P = sde.transition(t)
        F, c, Q = _linear(sde, shape, t)
        wanted = (F @ phi, F @ m + c, F @ P + P @ F.mT + Q)
        for name, a, b in zip(rows, slopes, wanted, strict=True):
            rows[name].append((a, b, float(t)))
        least = float(torch.linalg.eigvalsh(P).min() / P.diagonal().max())
        worst, when = min((worst, when), (least, float(t)))
    checks = []
    for name, pairs in rows.items():
        off, t_off = max((gap(a, b), t) for a, b, t in pairs)
        told = f"its equation to {off:.0e}" if off <= 1e-6 else (
            f"its slope is off by {off:.3g} of its size at t = {t_off:.4g} from what drift and "
            "diffusion say"
        )  # fmt: skip
        checks.append(Check(f"moments: {name}", off <= 1e-6, told))
    told = f"smallest eigenvalue {worst:.1g} of the largest variance, t = {when:.4g}"
    return [*checks, Check("moments: positive", worst > -1e-12, told)]


def _system_perturb(sde: LinearSystem, shape: tuple[int, ...]) -> Check:
    d = shape[0]
    units = torch.eye(d, dtype=DOUBLE)
    zero = torch.zeros_like(units)

    def pairs() -> Iterator[Pair]:
        for t in moments(sde):
            matrix, offset, covariance = sde.kernel_at(t)
            centre = sde.perturb(zero, t, zero)
            root = (sde.perturb(zero, t, units) - centre).mT
            yield centre[0], offset, float(t)
            yield root @ root.mT, covariance, float(t)
            yield (sde.perturb(units, t, zero) - centre).mT, matrix, float(t)

    return agree("perturb", pairs(), "the kernel's law")


def _system_reversal(sde: LinearSystem, shape: tuple[int, ...], eta: float) -> Check:
    """The reversed process keeps the marginals of Gaussian data."""
    d = shape[0]
    mean = torch.linspace(-1, 1, d, dtype=DOUBLE)
    data = GaussianSystemData(sde, mean, torch.diag(0.5 + torch.arange(d, dtype=DOUBLE)))
    process = ReverseSDE(sde, data, eta)

    def pairs() -> Iterator[Pair]:
        for t in moments(sde):
            F, c, Q = _linear(sde, (d,), t)
            m, C = data.law(t)
            B, b, noise = _linear(process, (d,), t)
            yield B @ m + b, F @ m + c, float(t)
            yield B @ C + C @ B.mT - noise, F @ C + C @ F.mT + Q, float(t)

    return agree(f"reversal, eta = {eta:g}", pairs(), "the marginals of Gaussian data")
