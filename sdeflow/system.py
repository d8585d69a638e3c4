"""`LinearSystem`: linear SDEs whose components are coupled by matrices, and their exact kernel.

    dX = (F(t) X + c(t)) dt + G(t) dw,     X_t | X_s ~ N(Phi X_s + m, P)
    Phi' = F Phi,   m' = F m + c,   P' = F P + P F^T + G G^T

See `transitions` for how they are solved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import ArgumentError, ShapeError
from .quadrature import Panels, Values, between
from .sde import SDE, as_time
from .transitions import (
    Clock,
    MatrixPanels,
    Transition,
    cholesky,
    constant_transition,
    root,
    transition,
)

Matrix = Tensor | Sequence[Any]
Schedule = Callable[[Tensor], Tensor]


class LinearSystem(SDE):
    """A linear SDE with matrices, dX = rate(t) (F X + c) dt + sqrt(rate(t)) G dw.

    The state x is (B, d, *): the matrices act on axis 1, the same for all that follows. Give them

        LinearSystem(F=[[0, 1], [-1, -2]], G=[[0], [2]])          # constant: numbers or tensors
        LinearSystem(F=lambda t: ..., G=lambda t: ..., T=2.0)     # or functions of time

    or write a class with methods F(t), G(t) and, if wanted, c(t), rate(t), start(); one whose
    matrices do not depend on t says `constant = True`.

    F (d, d), G (d, m), c (d,): for t of shape (N,) they are (N, d, d), ..., or the same for all.
    rate: a speed b(t) > 0 at which the clock of the system runs, a schedule.
    start: the covariance (d, d) at t = 0 of what is no data, such as a velocity.
    """

    __slots__ = ("_clock", "_panels")  # beside the fields: a remembered solution is no part of them
    _clock: Panels
    _panels: Panels
    noise: ClassVar = "matrix"
    additive: ClassVar[bool] = True
    constant: ClassVar[bool] = False
    """Whether F, c and G do not depend on t (`rate` may)."""
    t_min: float = 1e-3

    def __init__(
        self,
        F: Matrix | Schedule,
        G: Matrix | Schedule,
        c: Matrix | Schedule | None = None,
        *,
        rate: Schedule | None = None,
        start: Matrix | None = None,
        T: float = 1.0,
        t_min: float = 1e-3,
    ) -> None:
        given: dict[str, Any] = {"F": F, "G": G} | ({} if c is None else {"c": c})
        own = {name: v if callable(v) else _Constant(v) for name, v in given.items()}
        own["constant"] = all(isinstance(v, _Constant) for v in own.values())
        own |= {"T": T, "t_min": t_min}
        if rate is not None:
            own["rate"] = rate
        if start is not None:
            own["start"] = _Constant(start)
        for name, value in own.items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    def __post_init__(self) -> None:
        """Refuse what makes no system. Called by the __init__ of dataclasses, too."""
        if not (0 < self.T < math.inf and 0 <= self.t_min < self.T):
            raise ArgumentError(
                f"T={self.T!r} and t_min={self.t_min!r} must obey 0 <= t_min < T < inf"
            )
        self._matrices(torch.tensor(self.T / 2, dtype=torch.float64))

    def __getstate__(self) -> dict[str, Any]:
        return vars(self).copy()

    def F(self, t: Tensor) -> Tensor:
        """The drift's matrix, (d, d)."""
        raise NotImplementedError

    def G(self, t: Tensor) -> Tensor:
        """The noise's matrix, (d, m)."""
        raise NotImplementedError

    def c(self, t: Tensor) -> Tensor | None:
        """The drift's offset, (d,); None for none."""
        return None

    def rate(self, t: Tensor) -> Tensor | None:
        """The speed of the clock, b(t); None for 1."""
        return None

    def start(self) -> Tensor | None:
        """The covariance at t = 0 of what is no data, (d, d); None for zero."""
        return None

    # ---- as an SDE

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        F, c, _ = self._matrices(t)
        return apply(F, x) + shaped(c, x)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        """G for the whole state, (B, d, *, m n) with n the size of *: block-diagonal in *.

        Large where * is; `spread` and `covariance_product` never make it.
        """
        G, rest = self._matrices(t)[2].to(x), x.shape[2:]
        n = math.prod(rest)
        blocks = torch.einsum("...im,pq->...ipmq", G, torch.eye(n).to(x))
        return blocks.reshape(-1, G.shape[-2], *rest, G.shape[-1] * n).expand(
            x.shape[0], *[-1] * (x.ndim)
        )

    def noise_shape(self, x: Tensor) -> torch.Size:
        """(B, m, *): m Wiener processes for each place of *."""
        G = self._matrices(as_time(self.T))[2]
        return torch.Size((x.shape[0], G.shape[-1], *x.shape[2:]))

    def spread(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """G z, for normals (B, m, *), or the same flattened to (B, m n)."""
        G = self._matrices(t)[2]
        return apply(G, z.reshape(z.shape[0], G.shape[-1], *x.shape[2:]))

    def covariance_product(self, x: Tensor, t: Tensor, v: Tensor) -> Tensor:
        G = self._matrices(t)[2]
        return apply(G @ G.mT, v)

    # ---- the kernel

    def transition(self, t: Tensor | float, s: Tensor | float = 0.0) -> Transition:
        """The law of X_t given X_s, 0 <= s <= t; t and s of shape () or (B,)."""
        return self._transition(*torch.broadcast_tensors(as_time(t), as_time(s)))

    def _transition(self, t: Tensor, s: Tensor) -> Transition:
        if not bool((t >= s).all() and (s >= 0).all()):
            raise ArgumentError(
                f"transition(t, s) needs 0 <= s <= t; t={t.tolist()} and s={s.tolist()}"
            )
        if self.constant:
            F, c, G = self._matrices(torch.zeros((), dtype=t.dtype, device=t.device), clock=False)
            span = self.clock(t) - self.clock(s)
            return constant_transition(F, c, G @ G.mT, span)
        if bool((s == 0).all()):
            return transition(*self.panels.at(t))
        values = between(self.panels, s.reshape(-1), t.reshape(-1))
        return transition(*(v.reshape((*t.shape, *v.shape[1:])) for v in values))

    def kernel_at(self, t: Tensor | float) -> Transition:
        """The law of X_t given the data X_0: the transition from 0, and what `start` adds."""
        matrix, offset, covariance = self.transition(t)
        if (start := self.start()) is not None:
            covariance = covariance + matrix @ start.to(matrix) @ matrix.mT
        return Transition(matrix, offset, covariance)

    def mean(self, x0: Tensor, t: Tensor | float) -> Tensor:
        """E[X_t | X_0 = x0], of the shape of x0."""
        matrix, offset, _ = self.kernel_at(t)
        return apply(matrix, x0) + shaped(offset, x0)

    def perturb(self, x0: Tensor, t: Tensor | float, noise: Tensor) -> Tensor:
        """x_t = Phi x_0 + m + P^{1/2} noise, for unit normals of the shape of x0."""
        if noise.shape != x0.shape:
            raise ShapeError(
                f"noise has shape {tuple(noise.shape)}; it must be that of x0, {tuple(x0.shape)}"
            )
        matrix, offset, covariance = self.kernel_at(t)
        return apply(matrix, x0) + shaped(offset, x0) + apply(root(covariance), noise)

    def kernel_score(self, x: Tensor, x0: Tensor, t: Tensor | float) -> Tensor:
        """grad_x log p(x_t = x | x_0) = -P^{-1} (x - Phi x_0 - m), what a score is trained on."""
        matrix, offset, covariance = self.kernel_at(t)
        away = x - apply(matrix, x0) - shaped(offset, x)
        return -apply(torch.cholesky_inverse(cholesky(covariance, t)), away)

    def log_prob(self, x: Tensor, x0: Tensor, t: Tensor | float) -> Tensor:
        """log p(x_t = x | x_0), one number a sample, (B,)."""
        matrix, offset, covariance = self.kernel_at(t)
        factor = cholesky(covariance, t)
        away = (x - apply(matrix, x0) - shaped(offset, x)).to(factor.dtype)
        away = away.reshape(*x.shape[:2], -1)
        white = torch.linalg.solve_triangular(factor.to(x.device), away, upper=False)
        places = white.shape[2]
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1).to(x.device)
        size = places * white.shape[1] * math.log(2 * math.pi) / 2
        return -(white.square().sum((1, 2)) / 2 + places * log_det + size).to(x.dtype)

    def prior(self, noise: Tensor, t: Tensor | float | None = None) -> Tensor:
        """x_T = m + P^{1/2} noise: the law of x_T for data small beside its covariance."""
        _, offset, covariance = self.kernel_at(self.T if t is None else t)
        return shaped(offset, noise) + apply(root(covariance), noise)

    def clock(self, t: Tensor) -> Tensor:
        """INT_0^t rate, the time that has gone by for the matrices."""
        if type(self).rate is LinearSystem.rate and "rate" not in vars(self):
            return t
        if not hasattr(self, "_clock"):
            panels = Clock(lambda u: (_number(self.rate(u), u),)).build(self.T)
            object.__setattr__(self, "_clock", panels)
        return self._clock.at(t)[0]

    @property
    def panels(self) -> Panels:
        """The transitions from 0 of a system that changes in time, kept from the first use on."""
        if not hasattr(self, "_panels"):
            object.__setattr__(self, "_panels", MatrixPanels(self.coefficients).build(self.T))
        return self._panels

    def coefficients(self, t: Tensor) -> Values:
        F, c, G = (v.expand(*t.shape, *v.shape[-2:]) for v in self._matrices(t, columns=True))
        return F, c, G @ G.mT

    def _matrices(
        self, t: Tensor, clock: bool = True, columns: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """F, c and G at t, the clock's rate in them."""
        F, G = _entry(self, "F", t, 2), _entry(self, "G", t, 2)
        d = F.shape[-1]
        own = self.c(t)
        c = F.new_zeros(d) if own is None else _entry(self, "c", t, 1, own)
        if F.shape[-2] != d or G.shape[-2] != d or c.shape[-1] != d:
            raise ShapeError(
                f"{type(self).__name__}: F has shape {tuple(F.shape)}, G {tuple(G.shape)} and c "
                f"{tuple(c.shape)}; they must be (d, d), (d, m) and (d,), with one d"
            )
        b = self.rate(t) if clock else None
        if b is not None:
            b = _number(b, t)
            F, c, G = b[..., None, None] * F, b[..., None] * c, b.sqrt()[..., None, None] * G
        return F, c.unsqueeze(-1) if columns else c, G


# ---- small things


class _Constant:
    """A matrix of numbers as a function of time that is always the same."""

    def __init__(self, value: Matrix) -> None:
        if not isinstance(value, Tensor):
            value = torch.tensor(value, dtype=torch.float64)
        self.value = value

    def __call__(self, t: Tensor | None = None) -> Tensor:
        return self.value

    def __repr__(self) -> str:
        return repr(self.value.tolist())


def _number(value: Tensor | None, t: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=t.dtype, device=t.device).expand(t.shape)


def _entry(sde: LinearSystem, name: str, t: Tensor, rank: int, value: Any = None) -> Tensor:
    """A matrix of the system at t, of its own rank or with t's shape in front."""
    value = getattr(sde, name)(t) if value is None else value
    value = torch.as_tensor(value, dtype=t.dtype, device=t.device)
    if value.ndim == rank or (value.ndim == rank + t.ndim and value.shape[: t.ndim] == t.shape):
        return value
    what = "(d,)" if rank == 1 else "a matrix"
    raise ShapeError(
        f"{type(sde).__name__}: {name}(t) has shape {tuple(value.shape)} for t of shape "
        f"{tuple(t.shape)}; it must be {what}, with t's shape in front if it depends on t"
    )


def apply(matrix: Tensor, x: Tensor) -> Tensor:
    """The matrix, (d, k) or (B, d, k), on axis 1 of x (B, k, *)."""
    if x.ndim < 2 or x.shape[1] != matrix.shape[-1]:
        raise ShapeError(
            f"x has shape {tuple(x.shape)}; a system of {matrix.shape[-1]} coupled components "
            f"takes (B, {matrix.shape[-1]}, *)"
        )
    matrix = matrix.to(x)
    if x.ndim == 2:
        return (matrix @ x.unsqueeze(-1)).squeeze(-1)
    return (matrix @ x.flatten(2)).reshape(x.shape[0], matrix.shape[-2], *x.shape[2:])


def shaped(c: Tensor, x: Tensor) -> Tensor:
    """An offset, (d,) or (B, d), ready to be added to x (B, d, *)."""
    return c.to(x).reshape(-1, c.shape[-1], *[1] * (x.ndim - 2))
