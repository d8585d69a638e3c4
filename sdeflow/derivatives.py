"""Derivatives, by autograd, of what users write: slopes of schedules, and the two sums over the
derivatives of a diffusion G(x) that stochastic calculus asks for.

    divergence   div(G G^T)_i  = sum_jk d_j (G_ik G_jk)     in reverse SDEs and probability flows
    transport    sum_k (dg_k) g_k,  g_k the columns of G    twice the Ito-Stratonovich correction

Reverse mode throughout: forward mode fails through fused attention. A diffusion is given as a
function of x alone with its kind of noise: "elementwise", "scalar" or "matrix" (see `SDE`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]


def slope(schedule: Function, t: Tensor) -> Tensor:
    """d schedule/dt at t, of the shape of schedule(t)."""
    create = torch.is_grad_enabled() and t.requires_grad
    with torch.enable_grad():
        u = t if create else t.detach().requires_grad_()
        a = schedule(u)
        if not a.requires_grad:
            return torch.zeros_like(a)
        if a.shape == u.shape:
            slope = torch.autograd.grad(a.sum(), u, create_graph=create, allow_unused=True)[0]
            return torch.zeros_like(a) if slope is None else slope
        # More outputs than times: J v by differentiating v -> J^T v once more.
        v = torch.zeros_like(a, requires_grad=True)
        back = torch.autograd.grad(a, u, v, create_graph=True)[0]
        slope = torch.autograd.grad(back.sum(), v, create_graph=create)[0]
    return slope


def divergence(diffusion: Function, noise: str, x: Tensor) -> Tensor:
    """div(G G^T) at x, of the shape of x. Zero where G does not depend on x.

    Where the components of g look at themselves alone, two vector-Jacobian products tell so and
    are the answer (elementwise and scalar noise); otherwise d Jacobian-vector products are made,
    d being the size of one state.
    """
    if not x.numel():
        return torch.zeros_like(x)
    keep = _kept(diffusion, x)
    if noise == "elementwise":

        def squared(y: Tensor) -> Tensor:
            return (diffusion(y) ** 2).expand(y.shape)

        own = own_slopes(squared, x, keep)
        return _diagonal(squared, x, keep) if own is None else own
    if noise == "scalar":

        def column(y: Tensor) -> Tensor:
            return diffusion(y).expand(y.shape)

        own = own_slopes(column, x, keep)
        if own is not None:
            g = column(x) if keep else column(x).detach()
            return own * g + g * own.reshape(flat(x).shape).sum(1).reshape(one_each(x))
    g, along = linearise(lambda y: columns(diffusion(y), noise, y), x, keep)
    total = torch.zeros_like(flat(x))
    if along is not None:
        for j in range(total.shape[1]):
            slope_j = along(_basis(x, j))
            total = total + (slope_j @ g[:, j, :, None] + g @ slope_j[:, j, :, None])[..., 0]
    return total.reshape(x.shape)


def transport(diffusion: Function, noise: str, x: Tensor) -> Tensor:
    """sum_k (dg_k) g_k at x, of its shape, for scalar or matrix noise: a Jacobian-vector product
    for each of the m columns g_k of G. (For elementwise noise it is half of the divergence.)"""
    g, along = linearise(lambda y: columns(diffusion(y), noise, y), x, _kept(diffusion, x))
    if along is None:
        return torch.zeros_like(x)
    parts = [along(g[..., k].reshape(x.shape))[..., k] for k in range(g.shape[-1])]
    return torch.stack(parts).sum(0).reshape(x.shape)


def columns(g: Tensor, noise: str, x: Tensor) -> Tensor:
    """What `diffusion` returns for scalar or matrix noise, as (B, d, m)."""
    if noise == "scalar":
        g = g.expand(x.shape).unsqueeze(-1)
    return g.reshape(*flat(x).shape, g.shape[-1])


def linearise(function: Function, x: Tensor, keep: bool = False) -> tuple[Tensor, Function | None]:
    """function(x), and v -> the derivative of function at x along v; None where that is zero.

    keep: whether the two are to be differentiable themselves.
    """
    y = _leaf(x, keep)
    with torch.enable_grad():
        value = function(y)
        shown = value if keep else value.detach()
        if not value.requires_grad:
            return shown, None
        # Zeros, but behind `value` in the graph: a leaf would send every product below through all
        # that y was made of, which in a run is all its steps.
        u = value.masked_fill(torch.ones_like(value, dtype=torch.bool), 0)
        back = torch.autograd.grad(value, y, u, create_graph=True, allow_unused=True)[0]
    if back is None or not back.requires_grad:
        return shown, None

    def along(v: Tensor) -> Tensor:
        found = torch.autograd.grad(
            back, u, v, retain_graph=True, create_graph=keep, allow_unused=True
        )[0]
        return torch.zeros_like(shown) if found is None else found

    return shown, along


def own_slopes(function: Function, x: Tensor, keep: bool) -> Tensor | None:
    """d_i f_i where every f_i looks at x_i alone, zero where it looks at nothing; else None."""
    y = _leaf(x, keep)
    with torch.enable_grad():
        value = function(y)
    if not value.requires_grad:
        return torch.zeros_like(x)
    # An irregular probe: on a straight ramp, neighbours left and right would cancel.
    squares = torch.arange(x.numel(), dtype=x.dtype, device=x.device) ** 2
    probe = 1.5 + squares.sin().reshape(x.shape)
    first, second = (
        torch.autograd.grad(value, y, v, retain_graph=True, create_graph=keep, allow_unused=True)[0]
        for v in (torch.ones_like(value), probe)
    )
    if first is None or second is None:
        return torch.zeros_like(x)
    size = flat(second).abs().amax(1).reshape(one_each(x))  # samples may differ in scale
    tolerance = 1e3 * torch.finfo(x.dtype).eps
    return first if ((first * probe - second).abs() <= tolerance * size).all() else None


def _diagonal(function: Function, x: Tensor, keep: bool) -> Tensor:
    """d_i f_i where f_i looks at other components too: one product a component."""
    _, along = linearise(function, x, keep)
    if along is None:
        return torch.zeros_like(x)
    found = [flat(along(_basis(x, j)))[:, j] for j in range(flat(x).shape[1])]
    return torch.stack(found, 1).reshape(x.shape)


def _kept(function: Function, x: Tensor) -> bool:
    """Whether somebody may differentiate the result: with respect to x, or to a parameter."""
    return torch.is_grad_enabled() and (x.requires_grad or function(x).requires_grad)


def _leaf(x: Tensor, keep: bool) -> Tensor:
    return x if keep and x.requires_grad else x.detach().requires_grad_()


def flat(x: Tensor) -> Tensor:
    """A state (B, *) as (B, d)."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def one_each(x: Tensor) -> tuple[int, ...]:
    """The shape of one number a sample, ready to multiply a state."""
    return (x.shape[0], *[1] * (x.ndim - 1))


def _basis(x: Tensor, j: int) -> Tensor:
    """The j-th unit vector of the state space, for each sample of the batch."""
    e = torch.zeros_like(flat(x))
    e[:, j] = 1
    return e.reshape(x.shape)
