"""Random drifts and diffusions with known truth: linear ones written in many ways, and others."""

import math
import random
from typing import NamedTuple

import torch
from torch.nn import functional

from sdeflow import SDE

DOUBLE = torch.float64


class Truth(NamedTuple):
    """Coefficients as functions of a time (): rates f (scalar, or of the state's shape), or a
    matrix F with an offset c; and g (likewise), or a matrix G."""

    f: object = None
    g: object = None
    F: object = None
    c: object = None
    G: object = None


class Sample(NamedTuple):
    sde: SDE
    shape: tuple
    truth: Truth | None  # None: no linear SDE
    name: str


def user(drift, diffusion, **attributes):
    """An SDE made of two functions (x, t)."""
    methods = {
        "drift": lambda self, x, t: drift(x, t),
        "diffusion": lambda self, x, t: diffusion(x, t),
    }
    return type("User", (SDE,), {**methods, **attributes})()


def col(t, x):
    """t, ready to multiply x."""
    return t if t.ndim == 0 else t.reshape(-1, *[1] * (x.ndim - 1))


def rand(r, *shape, low=-2.0, high=2.0):
    g = torch.Generator().manual_seed(r.getrandbits(40))
    return low + (high - low) * torch.rand(*shape, dtype=DOUBLE, generator=g)


# ---- speeds: numbers that depend on t


def speed(r, positive=False):
    """(code, truth): a(t) as a user would write it, and as a function of a time ()."""
    a, b = r.uniform(0.2, 3), r.uniform(0.2, 3)
    sign = 1 if positive else r.choice((1, -1))
    choices = {
        "number": (lambda t: sign * a, lambda t: sign * a),
        "ramp": (lambda t: sign * (a + b * t), None),
        "exp": (lambda t: sign * a * torch.exp(-b * t), None),
        "tanh of t": (lambda t: sign * (a + torch.tanh(b * t)), None),
        "root": (lambda t: sign * torch.sqrt(a + b * t * t), None),
        "fraction": (lambda t: sign * a / (1 + b * t) ** 2, None),
        "where": (lambda t: sign * torch.where(t > 0.5, a + 0 * t, b + 0 * t), None),
        "autograd": (lambda t: _slope_of(lambda u: sign * (a * u + u.sin() * a / 2), t), None),
        "float": (
            lambda t: sign * a * math.exp(-b * float(t)),
            lambda t: sign * a * math.exp(-b * float(t)),
        ),
        "if": (lambda t: sign * a if t > 0.3 else sign * b, None),
    }
    weights = [4, 4, 4, 2, 2, 2, 2, 1, 1, 1]
    name = r.choices(list(choices), weights)[0]
    code, truth = choices[name]
    return name, code, truth or code


def _slope_of(function, t):
    with torch.enable_grad():
        u = t.detach().requires_grad_()
        return torch.autograd.grad(function(u).sum(), u)[0]


# ---- the same linear map, written in many ways


def _in_place(x, m):
    y = x.clone()
    y *= m
    return y


def _buffer(x, m):
    out = torch.zeros_like(x)
    out[:, :1] = x[:, :1]
    out[:, 1:] += x[:, 1:]
    return out.mul_(m)


def _fresh_buffer(x, m):
    out = torch.empty(x.shape, dtype=x.dtype)
    out.copy_(x)
    return out * m


def _potential(x, m):
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        return m * torch.autograd.grad((y.square() / 2).sum(), y)[0]


def _loop(x, m):
    return m * torch.stack([x[:, k] for k in range(x.shape[1])], 1)


def _by_sample(x, m):
    return m * torch.vmap(lambda v: v + 0.0)(x)


TIMES = {
    # x times m, m being a number or broadcasting against x
    "m x": lambda x, m: m * x,
    "x / (1/m)": lambda x, m: x / (1 / m),
    "-(-x m)": lambda x, m: -(-x * m),
    "x + (m - 1) x": lambda x, m: x + (m - 1) * x,
    "halves": lambda x, m: m * (0.5 * x) + (0.5 * m) * x,
    "in place": _in_place,
    "buffer": _buffer,
    "fresh buffer": _fresh_buffer,
    "potential": _potential,
    "loop": _loop,
    "vmap": _by_sample,
    "flips": lambda x, m: m * x.flip(-1).flip(-1),
    "rolls": lambda x, m: m * x.roll(1, 1).roll(-1, 1),
    "cat": lambda x, m: m * torch.cat((x[:, :1], x[:, 1:]), 1),
    "stack": lambda x, m: m * torch.stack((x, 2 * x, -x), 0).sum(0) / 2,
    "lerp": lambda x, m: torch.lerp(torch.zeros_like(x), x, 0.5) * (2 * m),
    "addcmul": lambda x, m: torch.addcmul(x, x, torch.as_tensor(m - 1.0, dtype=x.dtype)),
    "einsum": lambda x, m: torch.einsum("b...,b...->b...", m * x, torch.ones_like(x)),
    "fft": lambda x, m: m * torch.fft.irfft(torch.fft.rfft(x), n=x.shape[-1]),
    "index": lambda x, m: m * x[:, torch.arange(x.shape[1])],
    "mask": lambda x, m: m * torch.where(torch.arange(x.shape[-1]) % 2 == 0, x, 1.0 * x),
    "diff of cumsum": lambda x, m: m * torch.cumsum(x, -1).diff(dim=-1, prepend=0 * x[..., :1]),
    "reshape": lambda x, m: m * x.flatten(1).unflatten(1, x.shape[1:]),
    # the same to rounding, but by operations that are not linear
    "relu": lambda x, m: m * (torch.relu(x) - torch.relu(-x)),
    "sign": lambda x, m: m * x.abs() * x.sign(),
    "numpy": lambda x, m: m * torch.from_numpy(x.numpy() * 1.0),
    "branch": lambda x, m: m * x if float(x.sum()) > 1 else x * m,
}
FULL = {
    # A x along axis 1
    "x @ A.T": lambda x, A: x @ A.T,
    "A @ x": lambda x, A: (A @ x.mT).mT,
    "einsum": lambda x, A: torch.einsum("ij,bj->bi", A, x),
    "linear": lambda x, A: functional.linear(x, A),
    "bmm": lambda x, A: torch.bmm(A.expand(len(x), -1, -1), x.unsqueeze(-1)).squeeze(-1),
    "rows": lambda x, A: torch.stack([(x * row).sum(-1) for row in A], -1),
    "solve": lambda x, A: torch.linalg.solve(torch.linalg.inv(A), x.mT).mT,
    "tensordot": lambda x, A: torch.tensordot(x, A, ([1], [1])),
    "outer sum": lambda x, A: sum(x[:, k : k + 1] * A[:, k] for k in range(len(A))),
    "scatter": lambda x, A: torch.zeros_like(x).index_add(1, torch.arange(len(A)), x @ A.T),
    "conv": lambda x, A: functional.conv1d(x.unsqueeze(-1), A.unsqueeze(-1)).squeeze(-1),
    "numpy": lambda x, A: torch.from_numpy(x.numpy() @ A.T.numpy()),
}

# ---- what is not linear, added to what is


def crooked(r, components):
    """(name, function of x alone) that is not linear, however small or far out."""
    e, c = 10.0 ** r.uniform(-9, 0), 10.0 ** r.uniform(-3, 7)
    one_or_more = (
        ("cube", lambda x: e * x**3),
        ("square", lambda x: e * x * x),
        ("tanh", lambda x: e * torch.tanh(x)),
        ("sine", lambda x: e * c * torch.sin(x / c)),
        ("abs", lambda x: e * x.abs()),
        ("norm", lambda x: e * x.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1)) * x),
        (
            "normed",
            lambda x: e * x / (1 + x.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1))),
        ),
        ("saturation", lambda x: c * torch.tanh(x / c)),
        ("clamp", lambda x: x.clamp(-c, c)),
        ("threshold", lambda x: torch.where(x > c, 0 * x, x)),
        ("relu", lambda x: e * torch.relu(x - c)),
        ("softplus", lambda x: e * functional.softplus(x)),
        ("rounded", lambda x: torch.round(x / e) * e),
        ("window", lambda x: e * x * (((x - c) / c).abs() < 1e-4)),
        ("bump", lambda x: e * c * torch.exp(-(((x - c) / (1e-3 * c)) ** 2))),
        ("branch", lambda x: x if float(x.abs().max()) < c else 2 * x),
        ("gradient of a quartic", lambda x: e * _slope_of(lambda y: (y**4).sum(), x)),
        ("exp", lambda x: e * c * torch.expm1(x / c)),
        ("integers", lambda x: x + e * x.long()),
        ("root", lambda x: e * x.sign() * x.abs().sqrt()),
        ("batch mean", lambda x: e * x.mean(0)),
        ("batch size", lambda x: x / len(x)),
        ("batch norm", lambda x: e * x / (1 + x.std(0))),
        ("batch sum", lambda x: e * x.cumsum(0)),
        ("batch order", lambda x: x.roll(1, 0)),
    )
    several = (
        ("neighbours", lambda x: e * x * x.roll(1, -1)),
        ("largest", lambda x: e * x.amax(-1, keepdim=True).expand_as(x)),
        ("sorted", lambda x: x.sort(-1).values),
        ("median", lambda x: e * x.median(-1, keepdim=True).values + 0 * x),
        ("softmax", lambda x: e * torch.softmax(x, -1)),
    )
    return r.choice(one_or_more + several * (components > 1))


def draw(seed):
    """The random case of a seed: 6 in 10 are linear."""
    r = random.Random(seed)
    kind = r.choices(
        ("scalar", "elementwise", "matrix", "offset", "drift", "diffusion", "late"),
        (20, 15, 15, 10, 20, 15, 5),
    )[0]
    shape = r.choice(((3,), (2,), (1,), (5,), (3, 4), (2, 3, 3)))
    if kind in ("matrix", "offset"):
        shape = (r.randint(2, 5),)
    name_a, a, a_of = speed(r)
    name_g, g, g_of = speed(r, positive=True)
    way = r.choice(list(TIMES))
    times = TIMES[way]
    noise, g_truth, attributes = _noise(r, g, g_of, shape)
    title = f"{kind}: {way}, {name_a}, {name_g}, {shape}"
    if kind == "elementwise":
        kept = tuple(n if r.random() < 0.7 else 1 for n in shape)
        w = rand(r, *kept)

        def drift(x, t):
            return times(x, w * _times(a, t, x))

        truth = Truth(f=lambda t: w * a_of(t), g=g_truth)
    elif kind in ("matrix", "offset"):
        d = shape[0]
        A = rand(r, d, d) + 3 * torch.eye(d, dtype=DOUBLE)
        way = r.choice(list(FULL))
        title = f"{kind}: {way}, {name_a}, {name_g}, {shape}"
        if kind == "offset" and r.random() < 0.5:
            A = torch.eye(d, dtype=DOUBLE)
        m = rand(r, d) * (kind == "offset")

        def drift(x, t):
            return _times(a, t, x) * (FULL[way](x, A) + m)

        truth = Truth(F=lambda t: a_of(t) * A, c=lambda t: a_of(t) * m, g=g_truth)
    else:

        def drift(x, t):
            return times(x, _times(a, t, x))

        truth = Truth(f=a_of, g=g_truth)
    if kind == "drift":
        bend_name, bend = crooked(r, shape[-1])
        title, truth, straight = f"drift with {bend_name}; {title}", None, drift

        def drift(x, t):
            return straight(x, t) + bend(x)
    elif kind == "late":
        bend_name, bend = crooked(r, shape[-1])
        t0, title, truth, straight = r.uniform(0, 0.9), f"late {bend_name}; {title}", None, drift

        def drift(x, t):
            return straight(x, t) + (col(t, x) > t0) * bend(x)
    elif kind == "diffusion":
        bend_name, bend = crooked(r, shape[-1])
        title, truth, plain = f"diffusion with {bend_name}; {title}", None, noise

        def noise(x, t):
            extra = bend(x)
            return plain(x, t) + (extra.unsqueeze(-1) if attributes else extra)

    return Sample(user(drift, noise, **attributes), shape, truth, title)


def _times(a, t, x):
    """a(t), ready to multiply x; code that reads t as a number takes one time only."""
    return a(col(t, x))


def _noise(r, g, g_of, shape):
    """(code, truth, attributes) of a diffusion free of x."""
    way = r.choice(("plain", "ones", "vector", "expanded", "diagonal matrix"))
    v = 0.5 + rand(r, *shape, low=0, high=1)

    def number(x, t):
        return torch.as_tensor(_times(g, t, x), dtype=x.dtype)

    if way == "vector":
        return (lambda x, t: number(x, t) * v), (lambda t: g_of(t) * v), {}
    if way == "diagonal matrix" and len(shape) == 1:
        matrix = torch.diag(v)
        return (
            lambda x, t: number(x, t).reshape(-1, 1, 1) * matrix + 0 * x.new_ones(len(x), 1, 1),
            lambda t: g_of(t) * v,
            {"noise": "matrix"},
        )
    if way == "plain":
        return number, g_of, {}
    if way == "expanded":
        return (lambda x, t: number(x, t).expand(x.shape)), g_of, {}
    return (lambda x, t: number(x, t) * torch.ones_like(x)), g_of, {}
