"""Panels of Gauss quadrature: linear differential equations solved to rounding, by sums alone.

The time axis is cut into panels, each solved by Gauss-Legendre quadrature on 16 nodes, and panels
are composed. They are bisected until a panel agrees with its two halves, which finds singular
schedules and jumps by itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from .errors import ArgumentError, all_finite

ORDER = 16
TOLERANCE = 1e-13
"""Of a panel against its halves: their own error is then far below rounding."""
DEPTH, LIMIT = 60, 20_000

Values = tuple[Tensor, ...]
Coefficients = Callable[[Tensor], Values]
"""(N,) times -> tensors (N, *), the coefficients of the equation there."""


# fmt: off
POSITIVE = (
    # x                       weight, on [-1, 1]
    (0.095012509837637440185, 0.18945061045506849629),
    (0.28160355077925891323, 0.18260341504492358887),
    (0.45801677765722738634, 0.16915651939500253819),
    (0.61787624440264374845, 0.14959598881657673208),
    (0.7554044083550030339, 0.12462897125553387205),
    (0.86563120238783174388, 0.09515851168249278481),
    (0.94457502307323257608, 0.062253523938647892863),
    (0.9894009349916499326, 0.027152459411754094852),
)
# fmt: on


def _rule() -> tuple[Tensor, Tensor, Tensor]:
    """Nodes and weights on [0, 1], and the matrix B with INT_{x_i}^1 p = sum_j B_ij p(x_j).

    l_j = sum_k (2k+1)/2 w_j P_k(x_j) P_k on [-1, 1], and the integral of P_k is
    (P_{k+1} - P_{k-1})/(2k+1).
    """
    x, w = torch.tensor(POSITIVE, dtype=torch.float64).T
    x, w = torch.cat((-x.flip(0), x)), torch.cat((w.flip(0), w))
    p = [torch.ones_like(x), x]
    for k in range(1, ORDER):
        p.append(((2 * k + 1) * x * p[k] - k * p[k - 1]) / (k + 1))
    above = [1 - x] + [(p[k - 1] - p[k + 1]) / (2 * k + 1) for k in range(1, ORDER)]
    basis = [(k + 0.5) * w * p[k] for k in range(ORDER)]
    return (1 + x) / 2, w / 2, torch.stack(above, 1) @ torch.stack(basis) / 2


NODES, WEIGHTS, TAILS = _rule()


def nodes(a: Tensor, b: Tensor) -> Tensor:
    """The (K, ORDER) nodes of the panels from a to b, (K,) each; b < a runs down."""
    return a.unsqueeze(-1) + (b - a).unsqueeze(-1) * NODES.to(a)


def weighted(p: Tensor, h: Tensor) -> Tensor:
    """INT p over panels of width h, (K,): p (K, ORDER, *) -> (K, *)."""
    return torch.einsum("j,kj...->k...", WEIGHTS.to(p), p) * _against(h, p[:, 0])


def tails(p: Tensor, h: Tensor) -> Tensor:
    """INT p from each node to the end of its panel: (K, ORDER, *) -> (K, ORDER, *)."""
    return torch.einsum("ij,kj...->ki...", TAILS.to(p), p) * _against(h, p)


def _against(h: Tensor, p: Tensor) -> Tensor:
    return h.to(p).reshape(-1, *[1] * (p.ndim - 1))


class Panels(ABC):
    """The transitions of a linear equation, from 0 to any t remembered at the panels' ends.

    A subclass solves one panel and composes two. Nothing goes stale: the coefficients are asked
    again in every panel with each evaluation, and the panels made anew where they changed; where
    they need gradients, what is remembered is computed afresh inside the graph.
    """

    def __init__(self, coefficients: Coefficients) -> None:
        self.coefficients = coefficients

    @abstractmethod
    def panel(self, values: Values, a: Tensor, b: Tensor) -> Values:
        """The transitions (K, *) over panels from a to b, from the values (K, ORDER, *) at their
        nodes."""

    @abstractmethod
    def compose(self, first: Values, second: Values) -> Values:
        """The transition that is `first` and then `second`."""

    @abstractmethod
    def agree(self, whole: Values, halves: Values, values: Values, a: Tensor, b: Tensor) -> Tensor:
        """(K,) whether a panel's transition is that of its halves, within TOLERANCE and
        rounding."""

    def solve(self, a: Tensor, b: Tensor) -> tuple[Values, Values]:
        """(transitions over the panels, coefficients at their nodes)."""
        values = self.coefficients(nodes(a, b).reshape(-1))
        values = tuple(v.reshape(len(a), ORDER, *v.shape[1:]) for v in values)
        return self.panel(values, a, b), values

    def refine(self, knots: Tensor) -> Tensor:
        """Panel ends so close that each panel agrees with its halves; `knots` are among them."""
        a, b = knots[:-1], knots[1:]
        done = [knots]
        for _ in range(DEPTH):
            middle = (a + b) / 2
            whole, values = self.solve(a, b)
            for v in values:
                _check_finite(v, a, b)
            halves = self.compose(self.solve(a, middle)[0], self.solve(middle, b)[0])
            rough = ~self.agree(whole, halves, values, a, b)
            done.append(middle)  # the halves are at hand, and better
            a, b, middle = a[rough], b[rough], middle[rough]
            if not len(a):
                break
            if len(a) > LIMIT:
                raise ArgumentError(
                    f"the coefficients are too rough to be integrated: {len(a)} panels between "
                    f"t={float(a.min()):.6g} and {float(b.max()):.6g} do not settle; they must be "
                    "smooth but for a few jumps"
                )
            a, b = torch.cat((a, middle)), torch.cat((middle, b))
        return torch.cat(done).unique(sorted=True)

    @torch.no_grad()
    def build(self, T: float) -> Panels:
        """Choose the panels on [0, T], and remember the transitions from 0 to their ends."""
        self.knots = self.refine(torch.tensor([0.0, T], dtype=torch.float64))
        self.probes = self.knots[:-1] + 0.6 * self.knots.diff()
        self.seen = self.coefficients(self.probes)
        self.before = self.accumulate()
        return self

    def accumulate(self) -> Values:
        """The transitions from 0 to each panel's beginning, (K, *)."""
        each, _ = self.solve(self.knots[:-1], self.knots[1:])
        a = self.knots[:1]
        total, _ = self.solve(a, a)  # over nothing
        parts = [total]
        for k in range(len(self.knots) - 2):
            total = self.compose(total, tuple(v[k : k + 1] for v in each))
            parts.append(total)
        return tuple(torch.cat(v) for v in zip(*parts, strict=True))

    def at(self, t: Tensor) -> Values:
        """The transition from 0 to t, (*t.shape, *)."""
        end = t.reshape(-1).contiguous()
        for _ in range(2):
            knots, probes = self.knots.to(end), self.probes.to(end)
            k = (torch.searchsorted(knots, end.detach()) - 1).clamp(0, len(knots) - 2)
            a = knots[k]
            asked = self.coefficients(torch.cat((nodes(a, end).reshape(-1), probes)))
            n = len(end) * ORDER
            if all(
                new.shape[1:] == old.shape[1:] and torch.allclose(new[n:], old.to(new), 1e-12, 0.0)
                for new, old in zip(asked, self.seen, strict=True)
            ):
                break
            self.build(float(self.knots[-1]))
        values = tuple(v[:n].reshape(len(end), ORDER, *v.shape[1:]) for v in asked)
        graph = torch.is_grad_enabled() and any(v.requires_grad for v in asked)
        before = self.accumulate() if graph else self.before
        whole = self.compose(tuple(v.to(end)[k] for v in before), self.panel(values, a, end))
        return tuple(v.reshape((*t.shape, *v.shape[1:])) for v in whole)


def _check_finite(v: Tensor, a: Tensor, b: Tensor) -> None:
    if not all_finite(v):
        k, j = (~v.isfinite()).reshape(len(a), ORDER, -1).any(-1).nonzero()[0].tolist()
        raise ArgumentError(
            f"the coefficients are not finite at t={float(nodes(a, b)[k, j]):.6g}; they must be "
            "finite strictly between 0 and T"
        )


def between(panels: Panels, s: Tensor, t: Tensor) -> Values:
    """The transitions from s to t, (N,) each, s <= t: two ends of panels, and all in between."""
    s, t = s.contiguous(), t.contiguous()
    panels.at(t[:1])  # what has gone stale is made anew
    knots = panels.knots.to(t)
    first, last = (
        (torch.searchsorted(knots, end.detach()) - 1).clamp(0, len(knots) - 2) for end in (s, t)
    )
    total, _ = panels.solve(s, torch.minimum(t, knots[first + 1]))
    begin, end = int(first.min()) + 1, int(last.max())
    if end > begin:
        each, _ = panels.solve(knots[begin:end], knots[begin + 1 : end + 1])
        for k in range(begin, end):
            whole = panels.compose(total, tuple(v[k - begin, None] for v in each))
            inside = (k > first) & (k < last)
            total = tuple(
                torch.where(inside.reshape(-1, *[1] * (new.ndim - 1)), new, old)
                for new, old in zip(whole, total, strict=True)
            )
    rest, _ = panels.solve(torch.where(last > first, knots[last], t), t)
    return panels.compose(total, rest)


def variation(p: Tensor) -> Tensor:
    """The total variation over the nodes, (K, ORDER, *) -> (K, *): what rounding of the nodes'
    times, eps |t|, changes an integral by, per eps |t|."""
    return p.diff(dim=1).abs().sum(1)
