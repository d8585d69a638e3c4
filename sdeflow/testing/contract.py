"""What every forward SDE promises: shapes, times, dtypes, samples apart, and its declarations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..calculus import Hutchinson
from ..coefficients import Term
from ..derivatives import columns, linearise
from ..probe import coupled, directions, not_constant
from ..sde import SDE, GaussianSDE, as_time
from ..system import LinearSystem
from .report import Check

DOUBLE = torch.float64
Group = tuple[str, Callable[[], list[Check]]]
"""A name, and the checks that are made under it."""
Pair = tuple[Tensor, Tensor, float]
"""What must agree, and the time."""
CLOSE = 1e-8
"""Relative agreement that two roads to one number must show."""


def states(shape: tuple[int, ...], n: int = 6) -> Tensor:
    """Irregular states of size about 1, all positive: prices and variances must be."""
    x = directions(torch.Size(shape), torch.empty((), dtype=DOUBLE), n)[:n]
    return 0.4 + x.abs()


def moments(sde: SDE, n: int = 4) -> Tensor:
    """n times inside (0, T), none of them special."""
    return (torch.arange(n, dtype=DOUBLE) + 0.37) / n * float(sde.T)


def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference, in units of the largest value; NaN counts as infinite."""
    a, b = torch.broadcast_tensors(a.to(DOUBLE), b.to(DOUBLE))
    if not a.numel():
        return 0.0
    size = torch.maximum(a.abs().amax(), b.abs().amax()).clamp_min(1e-300)
    return float(((a - b).abs().amax() / size).nan_to_num(nan=math.inf))


def agree(name: str, pairs: Iterator[Pair], rule: str) -> Check:
    """Whether two roads agree at several times: (one, the other, t) each."""
    worst, when = max((gap(a, b), t) for a, b, t in pairs)
    if worst <= CLOSE:
        return Check(name, True, f"{rule} to {worst:.0e}")
    return Check(name, False, f"{rule}: off by {worst:.3g} of its size at t = {when:.4g}")


def contract(sde: SDE, shape: tuple[int, ...]) -> Iterator[Group]:
    """The checks of any forward SDE, by group."""
    x = states(shape)
    terms = (
        Term(sde, "drift", shape, DOUBLE, x.device),
        Term(sde, "diffusion", shape, DOUBLE, x.device),
    )
    yield "noise", lambda: _noise(sde, x)
    yield "times", lambda: [_times(term) for term in terms]
    yield "dtype", lambda: _dtype(sde, x)
    yield "finite", lambda: [_finite(term, x) for term in terms]
    yield "samples", lambda: [_samples(term) for term in terms]
    yield "additive", lambda: [_additive(sde, terms[1])]
    yield "spread", lambda: _products(sde, x)
    if not sde.additive and not isinstance(sde, Hutchinson):
        yield "divergence", lambda: [_divergence(sde, x)]
    if sde.commutative and sde.noise == "matrix":
        yield "commutative", lambda: [_commutative(sde, x)]


def _noise(sde: SDE, x: Tensor) -> list[Check]:
    """Drift and diffusion have the shapes that the declared kind of noise asks for."""
    t = as_time(0.4 * sde.T)
    f, g = sde.drift(x, t), sde.diffusion(x, t)
    told = f"{tuple(f.shape)} for x of shape {tuple(x.shape)}"
    checks = [Check("drift's shape", f.shape == x.shape, told)]
    if sde.noise == "matrix":
        fits = g.ndim == x.ndim + 1 and _broadcasts(g.shape[:-1], x.shape)
        rule = f"be (B, *, m) with (B, *) = {tuple(x.shape)}"
    else:
        fits = g.ndim <= x.ndim and _broadcasts(g.shape, x.shape)
        rule = f"broadcast to {tuple(x.shape)}"
    hint = "" if fits else f", but with noise = {sde.noise!r} it must {rule}"
    return [*checks, Check("noise", fits, f"{sde.noise}: g has shape {tuple(g.shape)}{hint}")]


def _broadcasts(small: torch.Size, large: torch.Size) -> bool:
    try:
        return torch.broadcast_shapes(small, large) == large
    except RuntimeError:
        return False


def _times(term: Term) -> Check:
    """Times (B,) give each sample what its own time gives it."""
    name = f"{term.which}: t (B,)"
    x = states(term.shape, 7 if 7 not in term.shape else 8)
    t = moments(term.sde, len(x)).flip(0)
    with torch.no_grad():
        alone = torch.cat([term(x[[k, k]], t[k])[:1] for k in range(len(x))])
        together = term(x, t)
    off = gap(together, alone)
    return Check(name, off <= CLOSE, f"rows differ by {off:.0e} from those at one time")


def _dtype(sde: SDE, x: Tensor) -> list[Check]:
    """A float32 state stays one: float64 times are numbers, no reason to promote it."""
    small, t = x.float(), as_time(0.4 * sde.T)
    f, g = sde.drift(small, t), sde.diffusion(small, t)
    kinds = [(small * v).dtype if v.ndim <= x.ndim else v.dtype for v in (f, g)]
    good = all(kind == torch.float32 for kind in kinds)
    shown = ", ".join(str(kind).removeprefix("torch.") for kind in kinds)
    return [Check("dtype", good, f"float32 states give drift and diffusion in {shown}")]


def _finite(term: Term, x: Tensor) -> Check:
    """Finite inside (0, T), and no NaN at 0 and T."""
    name, T = f"{term.which}: finite", float(term.sde.T)
    derived = isinstance(term.sde, GaussianSDE) and type(term.sde).rates is GaussianSDE.rates
    for u in (1e-3, 0.3, 0.7, 0.999, 0.0, 1.0):
        with torch.no_grad():
            value = term(x, as_time(u * T))
        bad = value.isnan() if u in (0.0, 1.0) else ~value.isfinite()
        if not bool(bad.any()):
            continue
        if u == 0 and derived:
            return Check(name, True, "NaN at t = 0, where sigma has no slope: see `rates`")
        found = "NaN" if bool(value.isnan().any()) else "infinite"
        return Check(name, False, f"{found} at t = {u * T:.4g}")
    return Check(name, True, "inside (0, T), and no NaN at 0 and T")


def _samples(term: Term) -> Check:
    """The value of a sample is its own: no batch statistics."""
    x = states(term.shape, 7)
    with torch.no_grad():
        how = next((h for t in moments(term.sde) if (h := coupled(term, x, t))), "")
    return Check(f"{term.which}: samples", not how, f"depends {how}" if how else "kept apart")


def _additive(sde: SDE, diffusion: Term) -> Check:
    """`additive` is the truth."""
    x, times = states(diffusion.shape), moments(sde, 3)

    def positive(y: Tensor, t: Tensor) -> Tensor:
        return diffusion(y.abs(), t)

    with torch.no_grad():
        found = next((f for t in times if (f := not_constant(positive, x, t, exact=False))), None)
    if sde.additive and found:
        return Check(
            "additive",
            False,
            f"additive = True, but g depends on x: at t = {found.t:.4g} it changes by "
            f"{found.ratio:.3g} of its value up to |x| = {found.size:.3g}; its divergence and the "
            "Stratonovich correction would be left out",
        )
    if not sde.additive and not found:
        return Check("additive", True, "g is free of x: `additive = True` would save evaluations")
    return Check("additive", True, f"{sde.additive}")


def _products(sde: SDE, x: Tensor) -> list[Check]:
    """`spread` and `covariance_product` are those of the diffusion."""
    shape = sde.noise_shape(x)
    z = directions(shape[1:], x, len(x))[: len(x)]
    v = directions(x.shape[1:], x, len(x))[: len(x)].flip(0)

    def full(t: Tensor) -> Tensor:
        g = sde.diffusion(x, t)
        if sde.noise == "elementwise":
            return torch.diag_embed((g * torch.ones_like(x)).flatten(1))
        return columns(g * torch.ones_like(x) if sde.noise == "scalar" else g, sde.noise, x)

    def pairs(which: str) -> Iterator[Pair]:
        for t in moments(sde):
            G = full(t).expand(len(x), -1, -1)
            if which == "spread":
                made = sde.spread(x, t, z)
                wanted = G @ z.flatten(1).unsqueeze(-1)
            else:
                made = sde.covariance_product(x, t, v)
                wanted = G @ (G.mT @ v.flatten(1).unsqueeze(-1))
            yield made.flatten(1), wanted.squeeze(-1), float(t)

    return [
        agree("spread", pairs("spread"), "G z"),
        agree("covariance_product", pairs("covariance"), "G G^T v"),
    ]


def _divergence(sde: SDE, x: Tensor) -> Check:
    """div(G G^T) is that of autograd."""
    if type(sde).divergence is SDE.divergence:
        return Check("divergence", True, "by autograd")
    pairs = ((sde.divergence(x, t), SDE.divergence(sde, x, t), float(t)) for t in moments(sde))
    return agree("divergence", pairs, "that of autograd")


def _commutative(sde: SDE, x: Tensor) -> Check:
    """(dg_k) g_l = (dg_l) g_k for all columns of G."""

    def pairs() -> Iterator[Pair]:
        for t in moments(sde):
            G, along = linearise(lambda y, t=t: columns(sde.diffusion(y, t), sde.noise, y), x)  # type: ignore[misc]
            if along is None:
                yield torch.zeros(1), torch.zeros(1), float(t)
                continue
            slopes = [along(G[..., k].reshape(x.shape)) for k in range(G.shape[-1])]
            L = torch.stack(slopes, -1)  # (B, d, l, k): column l differentiated along g_k
            yield L, L.mT, float(t)

    return agree("commutative", pairs(), "(dg_k) g_l = (dg_l) g_k")


def describes(sde: SDE) -> str:
    """What kind of SDE the report is about."""
    kind = "Gaussian" if isinstance(sde, GaussianSDE) else "no kernel"
    kind = "linear system" if isinstance(sde, LinearSystem) else kind
    return f"{kind}, {sde.noise} noise, {sde.calculus}"
