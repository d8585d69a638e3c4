"""Transition densities over a short time, for SDEs that have none in closed form: their scores.

    score = grad_y log p(x_t = y | x_s = x),   h = t - s small

euler         N(x + f h, G G^T h): one Euler-Maruyama step.
local_linear  the linear SDE with the Jacobian J of f at x, which has an exact normal kernel:
                  mean  x + h phi_1(hJ) f + h^2 phi_2(hJ) c,    c = 1/2 tr(G G^T Hess f)
                  covariance  int_0^h e^{Ju} G G^T e^{J^T u} du
              c is the Ito term. Source: Ozaki (1992); Shoji & Ozaki (1998); Jimenez (2002).
corrected     the same without c, times the Girsanov weight of what is left of the drift,
              r(u) = f(u) - f(x) - J (u - x), along the straight line from x to y: the expansion of
              Ait-Sahalia (2002, 2008), made about the linear process instead of about Brownian
              motion, so that it is exact for linear SDEs and small where they are a good guess.

Rms bias of E[score | x_t] on the double well dx = (x - x^3) dt + dw, x_0 ~ N(0, 1), t = 0.6, where
the score is 1.78: euler 0.86, 0.56, 0.33 at h = 0.2, 0.1, 0.05; local_linear 0.23, 0.088, 0.030;
corrected 0.046, 0.0078, 0.0011 (0.030 at h = 0.1 by the way of coupled components).

Where g_i looks at x_i alone, the work is done in the coordinate psi with d psi/dx = 1/g in which
the noise is one (Lamperti's), and noise that depends on the state costs no accuracy. Other noise is
held at its value in x: a bias of first order in h where it depends on the state. `corrected` is
`local_linear` where components are coupled and the noise depends on the state, and where G G^T is
singular. All coefficients are taken at the middle of [s, t].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .calculus import ito_drift
from .derivatives import columns, flat, one_each, own_slopes
from .errors import NonFiniteError, PairingError, ShapeError, all_finite, one_of
from .sde import SDE
from .system import constant_transition

KERNELS = ("euler", "local_linear", "corrected")


def local_score(
    sde: SDE, x: Tensor, s: Tensor, y: Tensor, t: Tensor, kernel: str = "corrected"
) -> Tensor:
    """grad_y log p(x_t = y | x_s = x), of the shape of y; a value, without gradients.

    sde: any forward SDE. x, y: states (B, *); s < t: times (B,). kernel: one of KERNELS.
    Components that are by themselves cost a few evaluations of f; coupled ones, d being the size
    of a state, Jacobians of (B, d, d). The density must exist: noise reaches every component,
    directly or ("local_linear") through the drift.
    """
    kernel = one_of("kernel", kernel, KERNELS)
    if sde.direction <= 0:
        raise PairingError(f"local_score wants a forward SDE, not {type(sde).__name__}")
    if x.shape != y.shape or s.shape != x.shape[:1] or t.shape != x.shape[:1]:
        raise ShapeError(
            f"x, y, s, t have shapes {tuple(x.shape)}, {tuple(y.shape)}, {tuple(s.shape)}, "
            f"{tuple(t.shape)}; they must be (B, *), (B, *), (B,), (B,)"
        )
    x, y = x.detach(), y.detach()
    s, t = (time.detach().to(dtype=x.dtype, device=x.device) for time in (s, t))
    with torch.enable_grad():
        if kernel == "euler":
            score = _euler(sde, x, y, s, t - s)
        else:
            middle = (s + t) / 2
            score = _second_order(sde, x, y, middle, t - s, kernel == "corrected")
    score = score.detach()
    if not all_finite(score):
        raise NonFiniteError(
            f"kernel={kernel!r}: the transition density of {type(sde).__name__} has no finite "
            "score at some of the states (is its noise zero there?)"
        )
    return score


# ---- reading the SDE


def _drift(sde: SDE, x: Tensor, t: Tensor) -> Tensor:
    f = ito_drift(sde, x, t)
    if f.shape != x.shape:
        raise ShapeError(
            f"{type(sde).__name__}.drift(x, t) returned shape {tuple(f.shape)} for x of shape "
            f"{tuple(x.shape)} and t of shape {tuple(t.shape)}; it must be that of x, for t of "
            "shape () and (B,): in a formula with t, use match(value_of_t, x, t) of sdeflow.sde"
        )
    return f


def _noise(sde: SDE, x: Tensor, t: Tensor) -> Tensor:
    """g of elementwise noise, of the shape of x."""
    return sde.diffusion(x, t).to(x.dtype).expand(x.shape)


def _slope(a: Tensor, x: Tensor, v: Tensor | None = None) -> Tensor:
    """v^T da/dx (v = 1 unless given), itself differentiable; zero where a does not look at x."""
    if not a.requires_grad:
        return torch.zeros_like(x)
    v = torch.ones_like(a) if v is None else v
    slope = torch.autograd.grad(a, x, v, create_graph=True, allow_unused=True)[0]
    return torch.zeros_like(x) if slope is None else slope


def phi1(z: Tensor) -> Tensor:
    """(e^z - 1)/z."""
    small = z.abs() < 1e-5
    safe = torch.where(small, 1.0, z)
    return torch.where(small, 1 + z / 2, torch.expm1(safe) / safe)


def phi2(z: Tensor) -> Tensor:
    """(e^z - 1 - z)/z^2."""
    small = z.abs() < 0.05
    safe = torch.where(small, 1.0, z)
    series = sum(z**k / math.factorial(k + 2) for k in range(8))
    return torch.where(small, series, (torch.expm1(safe) - safe) / safe**2)


# ---- the kernels


def _second_order(sde: SDE, x: Tensor, y: Tensor, t: Tensor, h: Tensor, corrected: bool) -> Tensor:
    """The score in the coordinates that fit the SDE; t is the middle of [s, s + h]."""
    if sde.noise == "elementwise":
        apart = own_slopes(lambda u: _noise(sde, u, t), x, False) is not None
        if apart and own_slopes(lambda u: _drift(sde, u, t), x, False) is not None:
            return _apart(sde, x, y, t, h, corrected)
        if apart and not _state_free(sde, x, t):
            return _bent(sde, x, y, t, h)
    return _frozen(sde, x, y, t, h, corrected)


def _euler(sde: SDE, x: Tensor, y: Tensor, s: Tensor, h: Tensor) -> Tensor:
    h = h.reshape(one_each(x))
    left = y - x - h * _drift(sde, x, s)
    if sde.noise == "elementwise":
        return -left / (_noise(sde, x, s) ** 2 * h)
    cov = _gram(sde, x, s) * h.reshape(-1, 1, 1)
    return _solve(cov, -flat(left), sde).reshape(x.shape).to(x.dtype)


def _apart(sde: SDE, x: Tensor, y: Tensor, t: Tensor, h: Tensor, corrected: bool) -> Tensor:
    """Each component by itself, in the coordinate where its noise is one."""

    def unit(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(mu, g, dg/du): the drift mu = f/g - g'/2 of psi, as a function of u = x(psi)."""
        time = t.expand(u.numel() // x.numel(), -1).flatten()
        flat = u.reshape(-1, *x.shape[1:])
        f = _drift(sde, flat, time).reshape(u.shape)
        g = _noise(sde, flat, time).reshape(u.shape)
        slope = _slope(g, u)
        return f / g - slope / 2, g, slope

    h, base = h.reshape(one_each(x)), x.clone().requires_grad_()
    mu, g, _ = unit(base)
    J = g * _slope(mu, base)
    c = torch.zeros_like(J) if corrected else g * _slope(J, base) / 2
    mu, J, c = mu.detach(), J.detach(), c.detach()
    mean = h * phi1(h * J) * mu + h**2 * phi2(h * J) * c
    variance = h * phi1(2 * h * J)

    y = y.clone().requires_grad_()
    nodes, weights, until = (a.to(x) for a in _gauss())
    nodes, weights = (a.reshape(-1, *[1] * x.ndim) for a in (nodes, weights))
    u = x + nodes * (y - x)
    mu_u, g_u, slope_u = unit(u)
    share = (weights / g_u).sum(0)
    moved = (y - x) * share  # psi(y) - psi(x)
    log_p = -((moved - mean) ** 2) / (2 * variance) - _noise(sde, y, t).log()
    if corrected:
        # Along the line psi moves by the parts `part` of the whole, in the shares `weight`.
        weight = weights / (g_u * share)
        part = torch.tensordot(until, 1 / g_u, 1) / share
        linear = mu + J * part * moved
        log_p = log_p + moved * (weight * (mu_u - linear)).sum(0)
        # The line is the mean of a bridge; its spread enters by two points either side.
        spread = (h * part * (1 - part)).sqrt()
        for sign in (1, -1):
            v = u + sign * spread * g_u + spread**2 * g_u * slope_u / 2
            mu_v, g_v, _ = unit(v)
            rest = mu_v**2 + g_v * _slope(mu_v, v) - (linear + sign * spread * J) ** 2
            log_p = log_p - h / 4 * (weight * rest).sum(0)
    return _slope(log_p, y)


def _bent(sde: SDE, x: Tensor, y: Tensor, t: Tensor, h: Tensor) -> Tensor:
    """Coupled drift, and noise where g_i looks at x_i: local_linear in the coordinates psi."""
    shape, x, y = x.shape, flat(x), flat(y).requires_grad_()

    def noise(u: Tensor) -> Tensor:
        return flat(_noise(sde, u.reshape(shape), t))

    def drift(u: Tensor) -> Tensor:
        g = noise(u)
        return flat(_drift(sde, u.reshape(shape), t)) / g - _slope(g, u) / 2

    base = x.clone().requires_grad_()
    mu, g, g_y = drift(base), noise(base), noise(y)
    # d/dpsi_j = g_j d/dx_j, once in J and twice in c
    J = _jacobian(mu, base) * g.unsqueeze(1)
    c = _ito_term(drift, base, torch.diag_embed(g.detach())) + _times(J, _slope(g, base)) / 2
    nodes, weights, _ = (a.tolist() for a in _gauss())
    share = sum(w / noise(x + a * (y - x)) for a, w in zip(nodes, weights, strict=True))
    eye = torch.eye(len(x[0]), dtype=torch.float64, device=x.device).expand_as(J)
    score = _local_linear(mu, J, c, eye, h, (y - x) * share, sde).to(x.dtype)
    return ((score - _slope(g_y, y)) / g_y).reshape(shape)


def _frozen(sde: SDE, x: Tensor, y: Tensor, t: Tensor, h: Tensor, corrected: bool) -> Tensor:
    """All components together, G held at its value in x."""
    shape, x, y = x.shape, flat(x), flat(y).double().requires_grad_()

    def drift(u: Tensor) -> Tensor:
        return flat(_drift(sde, u.to(t.dtype).reshape(shape), t)).double()

    base, G = x.double().requires_grad_(), _columns(sde, x.reshape(shape), t).double()
    f, cov = drift(base), G @ G.mT
    J, c, f = _jacobian(f, base).detach(), _ito_term(drift, base, G), f.detach()
    corrected = corrected and _state_free(sde, x.reshape(shape), t) and _definite(cov)
    moved = y - base.detach()
    score = _local_linear(f, J, 0 * c if corrected else c, cov, h, moved, sde)
    if corrected:
        inverse, h = torch.linalg.inv(cov), h.double()
        log_p = h / 6 * _dot(moved, _times(inverse, c))
        for node, weight in zip(*(a.tolist() for a in _gauss()[:2]), strict=True):
            u = base.detach() + node * moved
            f_u, linear = drift(u), f + node * _times(J, moved)
            turn = sum(_slope(f_u[:, i], u)[:, i] - J[:, i, i] for i in range(len(f[0])))
            rest = _dot(f_u, _times(inverse, f_u)) - _dot(linear, _times(inverse, linear))
            first = _dot(moved, _times(inverse, f_u - linear))
            log_p = log_p + weight * (first - h * (rest / 2 + node * turn))
        score = score + _slope(log_p, y)
    return score.reshape(shape).to(x.dtype)


def _local_linear(
    f: Tensor, J: Tensor, c: Tensor, Q: Tensor, h: Tensor, step: Tensor, sde: SDE
) -> Tensor:
    """-P^{-1} (step - m), the score of the law of du = (f + J u + c tau) dtau + Q^{1/2} dw."""
    f, J, c, h = (a.detach().double() for a in (f, J, c, h))
    # The clock tau is one more component, which no noise drives.
    pad = torch.nn.functional.pad
    F = pad(torch.cat((J, c.unsqueeze(-1)), -1), (0, 0, 0, 1))
    law = constant_transition(F, pad(f, (0, 1), value=1.0), pad(Q, (0, 1, 0, 1)), h)
    d = f.shape[1]
    return _solve(law.covariance[:, :d, :d], law.offset[:, :d] - step.detach(), sde)


@functools.cache
def _gauss() -> tuple[Tensor, Tensor, Tensor]:
    """Nodes and weights of the 5-point Gauss rule on [0, 1], and the matrix whose row q integrates
    from 0 to node q (exactly, polynomials of degree 4)."""
    inner, outer = (math.sqrt(5 + sign * 2 * math.sqrt(10 / 7)) / 3 for sign in (-1, 1))
    light, heavy = ((322 + sign * 13 * math.sqrt(70)) / 900 for sign in (-1, 1))
    a = (1 + torch.tensor([-outer, -inner, 0.0, inner, outer], dtype=torch.float64)) / 2
    w = torch.tensor([light, heavy, 128 / 225, heavy, light], dtype=torch.float64) / 2
    k = torch.arange(1, 6, dtype=torch.float64)
    return a, w, (a[:, None] ** k / k) @ torch.linalg.inv(a[:, None] ** (k - 1))


# ---- small linear algebra, batched


def _times(a: Tensor, v: Tensor) -> Tensor:
    return (a @ v[..., None])[..., 0]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _columns(sde: SDE, x: Tensor, t: Tensor) -> Tensor:
    """G(x, t) as (B, d, m), without gradients."""
    if sde.noise == "elementwise":
        return torch.diag_embed(flat(_noise(sde, x, t).detach()))
    g = sde.diffusion(x, t).detach().to(x.dtype)
    if sde.noise == "matrix":
        g = g.expand(*x.shape, g.shape[-1])
    return columns(g, sde.noise, x)


def _gram(sde: SDE, x: Tensor, t: Tensor) -> Tensor:
    g = _columns(sde, x, t).double()
    return g @ g.mT


def _state_free(sde: SDE, x: Tensor, t: Tensor) -> bool:
    return sde.additive or not sde.diffusion(x.clone().requires_grad_(), t).requires_grad


def _definite(cov: Tensor) -> bool:
    scale = cov.diagonal(dim1=1, dim2=2).clamp_min(1e-300).rsqrt()
    scaled = scale[:, :, None] * cov * scale[:, None, :]
    return bool((torch.linalg.eigvalsh(scaled)[:, 0] > 1e-10).all())


def _solve(cov: Tensor, v: Tensor, sde: SDE) -> Tensor:
    """cov^{-1} v, scaled to a unit diagonal first: the variances may differ by many orders."""
    scale = cov.diagonal(dim1=1, dim2=2).clamp_min(1e-300).rsqrt()
    factor, info = torch.linalg.cholesky_ex(scale[:, :, None] * cov * scale[:, None, :])
    if info.any():
        raise PairingError(
            f"{type(sde).__name__}: the covariance of a short step is singular at some states: the "
            "noise does not reach every component, and there is no density to take a score of; use "
            "kernel='local_linear' if it reaches them through the drift, or SlicedScoreMatching"
        )
    return scale * torch.cholesky_solve((scale * v.double())[..., None], factor)[..., 0]


def _jacobian(f: Tensor, x: Tensor) -> Tensor:
    """df_i/dx_j, (B, d, d), by d vector-Jacobian products."""
    return torch.stack([_slope(f[:, i], x) for i in range(f.shape[1])], 1)


def _ito_term(f: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> Tensor:
    """1/2 tr(G G^T Hess f), (B, d): the second derivative of f along each column of G."""
    total = torch.zeros_like(x)
    for k in range(g.shape[-1]):
        slope, v = f(x), g[..., k]
        for _ in range(2):
            # Reverse mode twice is forward mode: J v is the slope in w of w^T J v.
            w = torch.zeros_like(slope, requires_grad=True)
            slope = _slope(_dot(_slope(slope, x, w), v).sum(), w)
        total = total + slope.detach()
    return total / 2
