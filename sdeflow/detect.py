"""From a drift and a diffusion to the Gaussian kernel: is the SDE linear, and with what rates?

`gaussian(sde)` decides whether dx = f(x, t) dt + g(x, t) dw is linear in x with noise that is free
of x, reads off the coefficients, and returns an SDE with a kernel, or says why there is none.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .coefficients import Layout, Matrices, Rate, Structure, Term, layout
from .degree import Degree, Untraceable, degree
from .errors import ArgumentError, ShapeError
from .linear import LinearSDE
from .probe import Finding, coupled, not_affine, not_constant, off_the_ladder, switches
from .sde import SDE, GaussianSDE
from .system import LinearSystem

Known = Literal["declared", "traced", "probed"]
SAME_EVERYWHERE = Layout("scalar", "scalar", offset=False, kept=(), axis=True, scale=1.0)
"""One equation, f(t) x dt + g(t) dw, for each component: the shape of the state does not matter."""


@dataclass(frozen=True)
class Linearity:
    """What is known of a linear SDE, and how.

    known: "declared" (the SDE says `linear = True`, or is Gaussian by its class), "traced" (proved:
        every operation on x was followed, for all x and t) or "probed" (tried at many states and
        times; code that branches on values, or leaves torch, cannot be traced).
    structure: of the drift: "scalar", f(t) x; "elementwise", a rate for each component; "matrix".
    noise: of G G^T, likewise.
    offset: whether the drift has a part free of x.
    shape: the shape of the state at which all this was found, without the batch.
    """

    known: Known
    structure: Structure
    noise: Structure
    offset: bool
    shape: tuple[int, ...]


def gaussian(sde: SDE, x: Tensor | Sequence[int] | None = None) -> GaussianSDE | LinearSystem:
    """The Gaussian SDE that `sde` is: a `LinearSDE`, or a `LinearSystem` where components couple.

    sde: any forward SDE with `drift` and `diffusion`. It must be linear in x, f(x, t) = F(t) x +
        c(t), with noise that is free of x. Where F is one rate, or one for each component, c is 0
        and G G^T is diagonal, the result is a `GaussianSDE` for every solver, grid, denoiser and
        loss; otherwise it is a `LinearSystem`, whose matrices act on axis 1 of the state.
    x: an example state (B, *), or the shape of one state without its batch. Without it vectors of
        3 numbers are tried, then of 1 to 12: enough where every component obeys the same equation.

    The result's `linearity` tells how it is known; see `Linearity`. A class that says `linear =
    True` is believed. An SDE with a kernel is returned as it is. What is not linear, or couples the
    samples of a batch, is refused with the term, the time and the ratio that were found.
    """
    if isinstance(sde, GaussianSDE | LinearSystem):
        return sde
    if not isinstance(sde, SDE) or sde.direction != 1:
        raise ArgumentError(
            f"sde={sde!r} must be a forward SDE: a subclass of sdeflow.SDE with drift and diffusion"
        )
    if not 0 < float(sde.T) < math.inf:
        raise ArgumentError(f"{type(sde).__name__}.T={sde.T!r} must be finite and > 0")
    terms, several = _terms(sde, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of overflows, where states are as large as 1e90
        for term in terms:
            _check_batch(term)
        known = _how_known(sde, terms)
    found = layout(*terms, small=known == "declared")
    if known == "declared":
        _check_declared(terms, found)
    if several and x is None and found != SAME_EVERYWHERE:
        raise ShapeError(
            f"{type(sde).__name__} is linear, but not one equation for every component, and it "
            "runs for states of several shapes; give gaussian(sde, x) an example state x, or its "
            "shape"
        )
    made = _build(sde, *terms, found)
    report = Linearity(known, found.structure, found.noise, found.offset, terms[0].shape)
    object.__setattr__(made, "linearity", report)
    return made


def example_shape(sde: SDE, x: Tensor | Sequence[int] | None = None) -> tuple[int, ...]:
    """A shape of one state for which drift and diffusion run; see `gaussian`."""
    return _terms(sde, x)[0][0].shape


def state_shape(x: Tensor | Sequence[int]) -> tuple[int, ...]:
    """The shape of one state, from an example (B, *) or as it stands."""
    if isinstance(x, Tensor):
        if x.ndim < 2:
            raise ShapeError(f"x has shape {tuple(x.shape)}; it must be (B, *), an example state")
        return tuple(x.shape[1:])
    shape = tuple(int(n) for n in x)
    if not shape or min(shape) < 1:
        raise ShapeError(f"x={x!r} must be the shape of one state, such as (3,) or (3, 32, 32)")
    return shape


def _terms(sde: SDE, x: Tensor | Sequence[int] | None) -> tuple[tuple[Term, Term], bool]:
    """Drift and diffusion at a shape and dtype for which they run, and whether others did too."""
    device = x.device if isinstance(x, Tensor) else torch.device("cpu")
    sizes = [(3,), (2,), (1,), *((d,) for d in range(4, 13))] if x is None else [state_shape(x)]
    found, error = [], None
    for shape in sizes:
        for dtype in (torch.float64, torch.float32):
            try:
                terms = (
                    Term(sde, "drift", shape, dtype, device),
                    Term(sde, "diffusion", shape, dtype, device),
                )
                for term in terms:
                    with torch.no_grad():
                        term(*term.example())
                found.append(terms)
                break
            except ShapeError as problem:
                error = error or problem
    if not found:
        hint = "" if x is not None else "; give x, an example state, or the shape of one"
        raise ShapeError(f"{error}{hint}")
    drift, diffusion = (replace(term, batched=term.takes_batches()) for term in found[0])
    return (drift, diffusion), len(found) > 1


@torch.no_grad()
def _check_batch(term: Term) -> None:
    """Refuse what is random, or looks at other samples."""
    x, t = term.example()
    first, second = term(x, t), term(x, t)
    if not torch.equal(first.nan_to_num(), second.nan_to_num()):
        raise ArgumentError(
            f"{term} gives another value when called again with the same x and t; randomness "
            "belongs in the noise, not in the coefficients"
        )
    for time in term.times(3):
        if how := coupled(term, x, time):
            raise ArgumentError(
                f"{term} of a sample depends {how}; each sample must obey its own equation: reduce "
                "over the axes of the state, x.mean(-1) or x.flatten(1), never over axis 0 (and "
                "give gaussian(sde, x) an example x if the state has more axes)"
            )


def _how_known(sde: SDE, terms: tuple[Term, Term]) -> Known:
    if getattr(sde, "linear", False):
        return "declared"
    how: Known = "traced"
    for term, allowed in zip(terms, (1, 0), strict=True):
        met = _degree(term)
        if met.degree > allowed:
            how = "probed"
            met_how = met.because or f"x to the power {met.degree:g}"
            _probe(term, constant=not allowed, met=met_how)
    return how


def _degree(term: Term) -> Degree:
    x, t = term.example()
    try:
        return degree(term.raw, x, t)
    except Untraceable as why:
        return Degree(math.inf, str(why))


@torch.no_grad()
def _probe(term: Term, constant: bool, met: str) -> None:
    """Raise unless the term is affine in x, or constant, as far as probes can tell."""
    x, _ = term.example()
    look = not_constant if constant else not_affine
    times = term.times(48)
    for k, t in enumerate([*times, *switches(term, x, times)]):
        finding = look(term, x, t, exact=k % 24 == 0)
        if finding is None and k in (0, 24, 47):
            finding = off_the_ladder(term, x, t, constant)
        if finding:
            raise ArgumentError(_story(term, finding, constant, met))


def _story(term: Term, finding: Finding, constant: bool, met: str) -> str:
    where = f"at t={finding.t:.4g} and |x| up to {finding.size:.3g}"
    if finding.kind == "finite":
        return f"{term} is not finite {where}: no coefficients can be read off there"
    if constant:
        what = f"depends on x: {where} it changes by {finding.ratio:.3g} of its value"
        remedy = "noise that depends on the state has no Gaussian kernel"
    else:
        law = "f(a x) = a f(x)" if finding.kind == "scaling" else "f(u + v) = f(u) + f(v)"
        what = f"is not linear in x: {where} {law} is off by a factor of {finding.ratio:.3g}"
        remedy = "a nonlinear drift has no Gaussian kernel"
    trace = "" if " " in met and "power" not in met else f" (its code has {met})"
    return (
        f"{term} {what}{trace}; {remedy}: simulate the SDE as it is, or, where this may be "
        "neglected, say `linear = True` on its class"
    )


@torch.no_grad()
def _check_declared(terms: tuple[Term, Term], found: Layout) -> None:
    """A declaration is believed, but not against what it gives at states of size 1."""
    drift, diffusion = terms
    x, t = drift.example()
    x = x / x.abs().max()
    f, c = drift(x, t), drift(torch.zeros_like(x), t)
    if found.structure != "matrix":
        expected = c + Rate(drift, found.kept)(t) * x
    elif found.axis:
        expected = c + torch.einsum("ij,kj...->ki...", Matrices(drift, "F")(t).to(x), x)
    else:
        expected = f
    pairs = ((drift, f, expected), (diffusion, diffusion(x, t), diffusion(-0.5 * x, t)))
    for term, value, linear in pairs:
        ratio = float((value - linear).abs().amax() / value.abs().amax().clamp_min(1e-300))
        if not ratio < 1e-4:
            raise ArgumentError(
                f"{type(term.sde).__name__} says linear = True, but at t={float(t):.4g} and |x| up "
                f"to 1 {term} is off by {ratio:.3g} of its value; take the declaration back"
            )


def _build(sde: SDE, drift: Term, diffusion: Term, found: Layout) -> LinearSDE | LinearSystem:
    T = float(sde.T)
    t_min = float(getattr(sde, "t_min", min(1e-3, 1e-3 * T)))
    if not found.offset and "matrix" not in (found.structure, found.noise):
        rate, noise = Rate(drift, found.kept), Rate(diffusion, found.kept)
        _check_noise(noise)
        return LinearSDE(rate, noise, T=T, t_min=t_min)
    if not found.axis:
        raise ArgumentError(
            f"{type(sde).__name__} is linear, but its coefficients couple or differ along more "
            f"axes of the state {drift.shape} than axis 1, the only one that the matrices of a "
            "LinearSystem act on: write it for flat states (B, d)"
        )
    F, G = Matrices(drift, "F", found.scale), Matrices(diffusion, "G")
    c = Matrices(drift, "c") if found.offset else None
    if _constant(drift) and _constant(diffusion):
        at = torch.tensor(T / 2, dtype=torch.float64)
        return LinearSystem(F(at), G(at), None if c is None else c(at), T=T, t_min=t_min)
    return LinearSystem(F, G, c, T=T, t_min=t_min)


def _constant(term: Term) -> bool:
    """Whether a term is proved not to depend on t: its degree in t is 0."""
    x, t = term.example()
    try:
        return degree(lambda t, x: term.raw(x, t), t, x).degree == 0
    except Untraceable:
        return False


def _check_noise(noise: Rate) -> None:
    """Without noise somewhere there is no density to speak of."""
    with torch.no_grad():
        g = noise(noise.term.times(24))
    if not bool((g.square().sum(0) > 0).all()):
        raise ArgumentError(
            f"{noise.term} is zero at all times for some component: sigma = 0 there, so that there "
            "is no score; an ODE needs none (a solver such as Heun() runs it)"
        )
