"""torchsde's methods on every kind of noise: the library's own steps, its strong orders, its two
mistakes and what is done about them, and the Levy area."""

import numpy as np
import pytest
import torch
import torchsde

from sdeflow import GBM, OU, SDE, BrownianPath, PairingError, TorchSDE, integrate
from sdeflow.backends import SDE_METHODS
from sdeflow.backends._torchsde import Clock, Increments

DOUBLE = {"dtype": torch.float64}
UNEVEN = torch.tensor([0.0, 0.1, 0.15, 0.4, 1.0], **DOUBLE)
MATRIX = [m for m, known in SDE_METHODS.items() if known.matrix]
every_method = pytest.mark.parametrize("method", SDE_METHODS)


# ---- the library itself, where it can go


class Replay(torchsde.BaseBrownian):
    """The increments of a run of ours, for torchsde's driver."""

    def __init__(self, normals, h):
        super().__init__()
        self.normals, self.h = normals, h

    def __call__(self, ta, tb=None, return_U=False, return_A=False):
        z, other = self.normals[round(float(ta) / self.h)]
        w, u = self.h**0.5 * z, self.h**1.5 * (z / 2 + other / 12**0.5)
        if return_U:
            return w, u
        return (w, torch.zeros(*w.shape, w.shape[1], **DOUBLE)) if return_A else w

    def __repr__(self):
        return "Replay()"

    @property
    def shape(self):
        return self.normals.shape[2:]

    levy_area_approximation = "foster"
    dtype = property(lambda self: torch.float64)
    device = property(lambda self: torch.device("cpu"))


class Theirs(torch.nn.Module):
    types = {"elementwise": "diagonal", "scalar": "scalar", "matrix": "general"}

    def __init__(self, sde, calculus):
        super().__init__()
        self.sde, self.sde_type, self.noise_type = sde, calculus, self.types[sde.noise]

    def f(self, t, y):
        return self.sde.drift(y, t)

    def g(self, t, y):
        g = self.sde.diffusion(y, t)
        if self.noise_type == "general":
            return g
        return g.expand(y.shape).unsqueeze(-1) if self.noise_type == "scalar" else g.expand(y.shape)


class Waves(SDE):
    """Noise of any kind that looks at the state, in the sense that is asked for."""

    def __init__(self, noise, calculus):
        self.noise, self.calculus = noise, calculus

    def drift(self, x, t):
        return torch.cos(x + t)

    def diffusion(self, x, t):
        if self.noise == "elementwise":
            return torch.sin(2 * x) + t
        if self.noise == "scalar":
            return torch.sin(x.flip(1)) + t
        return torch.stack((torch.sin(x.flip(1)), 0.3 * x), -1)


KINDS = [
    (kind, method)
    for kind in ("elementwise", "scalar", "matrix")
    for method in (MATRIX if kind == "matrix" else SDE_METHODS)
    if kind != "scalar" or "milstein" not in method
]


@pytest.mark.parametrize(("kind", "method"), KINDS)
def test_a_run_is_torchsde_s_own_on_an_even_grid(kind, method):
    """All but their Milstein scheme for scalar noise, which is wrong (see below), and the Levy
    areas of log_ode, which are too (see below): it is compared on matrices of one column."""
    calculus = SDE_METHODS[method].calculus
    sde = Waves(kind, calculus)
    ts, y = torch.linspace(0, 1, 9, **DOUBLE), torch.rand(4, 3, **DOUBLE) + 0.5
    normals = torch.randn(8, 2, *sde.noise_shape(y), **DOUBLE)
    if kind == "matrix" and method == "log_ode":
        sde, normals = Waves("matrix", calculus), normals[..., :1]
        sde.diffusion = lambda x, t: torch.sin(x.flip(1))[..., None]
    brownian = Replay(normals, 1 / 8)
    theirs = torchsde.sdeint(
        Theirs(sde, calculus),
        y,
        ts,
        bm=brownian,
        method=method.removesuffix("_stratonovich"),
        dt=1 / 8,
        dt_min=1e-9,
    )
    draws = {}

    def noise(t, s):
        k = round(float(t) * 8)
        draws[k] = draws.get(k, -1) + 1
        return normals[k, draws[k]]

    ours = integrate(sde, y, ts, TorchSDE(method), noise=noise, keep=True).path
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# ---- strong orders


def slope(process, start, exact, path, method, steps=(16, 128)):
    """The measured strong order: mean errors at two numbers of steps on the same paths."""
    errors = []
    for n in steps:
        ts = torch.linspace(0, 1, n + 1, **DOUBLE)
        end = integrate(process, start, ts, TorchSDE(method), noise=path).x
        errors.append(float((end - exact).abs().mean()))
    return np.log(errors[0] / errors[-1]) / np.log(steps[-1] / steps[0])


@every_method
def test_the_strong_order_on_geometric_brownian_motion(method):
    """Ito's, against the closed form: the drift is converted for Stratonovich's methods."""
    path = BrownianPath(1, (4000, 1), torch.linspace(0, 1, 129, **DOUBLE))
    exact = torch.exp(0.3 - 0.7**2 / 2 + 0.7 * path.increment(0.0, 1.0)[0])
    process = GBM(0.3, 0.7)
    assert TorchSDE(method).strong_order_on(process) == SDE_METHODS[method].commuting
    measured = slope(process, torch.ones(4000, 1, **DOUBLE), exact, path, method)
    assert measured == pytest.approx(SDE_METHODS[method].commuting, abs=0.1)


class Turned(SDE):
    """dX = A X o dw for a nilpotent A, whose derivative is not symmetric: X_t = X_0 + A X_0 w_t."""

    noise = "scalar"
    calculus = "stratonovich"

    def drift(self, x, t):
        return torch.zeros_like(x)

    def diffusion(self, x, t):
        return torch.stack((x[:, 1], 0 * x[:, 1]), 1)


@every_method
def test_scalar_noise_that_couples_components_is_differentiated_the_right_way_round(method):
    """(dg) g = A A x = 0. The library's own Milstein scheme has g (dg)^T = A^T A x instead."""
    path = BrownianPath(1, (500, 1), torch.linspace(0, 1, 9, **DOUBLE))
    start = torch.tensor([[1.0, 2.0]], **DOUBLE).expand(500, 2)
    w = path.increment(0.0, 1.0)[0]
    exact = torch.cat((1 + 2 * w, 2 + 0 * w), 1)
    end = integrate(Turned(), start, path.ts, TorchSDE(method), noise=path).x
    torch.testing.assert_close(end, exact, rtol=1e-12, atol=1e-12)


def test_the_library_s_own_milstein_is_not_on_scalar_noise():
    """The planted fault of the theorem above."""
    start, normals = torch.tensor([[1.0, 2.0]], **DOUBLE), torch.ones(1, 2, 1, 1, **DOUBLE)
    end = torchsde.sdeint(
        Theirs(Turned(), "stratonovich"),
        start,
        torch.tensor([0.0, 1.0], **DOUBLE),
        bm=Replay(normals, 1.0),
        method="milstein",
        dt=1.0,
    )[-1]
    assert torch.equal(end, torch.tensor([[3.0, 2.0 + 0.5 * 2.0]], **DOUBLE))


class Rotating(SDE):
    """Noise that does not commute: dX1 = X2 o dw1, dX2 = X1 o dw2."""

    noise = "matrix"
    calculus = "stratonovich"

    def drift(self, x, t):
        return torch.zeros_like(x)

    def diffusion(self, x, t):
        first, second = x[:, :1], x[:, 1:]
        return torch.stack(
            (torch.cat((second, 0 * x[:, :1]), 1), torch.cat((0 * x[:, :1], first), 1)), -1
        )


@pytest.mark.parametrize("method", MATRIX)
def test_the_strong_order_on_noise_that_does_not_commute_is_a_half(method):
    """Against the midpoint rule on 1,024 steps; both end at Ito's solution, or Stratonovich's."""
    path = BrownianPath(1, (2000, 2), torch.linspace(0, 1, 1025, **DOUBLE))
    start = torch.ones(2000, 2, **DOUBLE)
    exact = integrate(Rotating(), start, path.ts, TorchSDE("midpoint"), noise=path).x
    assert TorchSDE(method).strong_order_on(Rotating()) == 0.5
    assert slope(Rotating(), start, exact, path, method, (16, 64)) == pytest.approx(0.5, abs=0.12)


def test_the_mean_of_the_levy_area_is_worth_half_of_its_variance():
    """On a first-class path log_ode knows the best guess of the area given W and its integral: its
    error is half in the square of what the midpoint rule makes, which knows nothing of the area."""
    path = BrownianPath(1, (2000, 2), torch.linspace(0, 1, 257, **DOUBLE))
    start = torch.ones(2000, 2, **DOUBLE)
    exact = integrate(Rotating(), start, path.ts, TorchSDE("log_ode"), noise=path).x
    squares = [
        float((integrate(Rotating(), start, path.ts[::32], solver, noise=path).x - exact).var())
        for solver in (TorchSDE("midpoint"), TorchSDE("log_ode"))
    ]
    assert squares[1] < 0.6 * squares[0]


# ---- refusals

DIAGONAL = ["milstein", "milstein_stratonovich", "srk"]


@pytest.mark.parametrize("method", DIAGONAL)
def test_methods_for_elementwise_noise_refuse_a_matrix_that_looks_at_the_state(method):
    with pytest.raises(PairingError, match=rf"{method} takes elementwise, scalar .*'euler'"):
        integrate(Rotating(), torch.ones(2, 2), UNEVEN, TorchSDE(method))


@pytest.mark.parametrize("method", DIAGONAL)
def test_methods_for_elementwise_noise_refuse_one_that_couples_components(method):
    class Coupled(SDE):
        def drift(self, x, t):
            raise AssertionError("the drift was evaluated")

        def diffusion(self, x, t):
            return x.flip(1)

    with pytest.raises(PairingError, match="looks at x_i alone.*'heun'"):
        integrate(Coupled(), torch.ones(2, 2), UNEVEN, TorchSDE(method))


@pytest.mark.parametrize("noise", ["elementwise", "scalar", "matrix"])
@pytest.mark.parametrize("method", MATRIX)
def test_an_empty_batch_of_any_noise_stays_empty(noise, method):
    end = integrate(Waves(noise, "ito"), torch.zeros(0, 3), UNEVEN, TorchSDE(method), seed=1)
    assert end.x.shape == (0, 3)


# ---- the increments


@pytest.mark.parametrize("backwards", [False, True])
def test_the_integral_of_the_increment_has_its_exact_law(backwards):
    """Var W = 1, Var U = 1/3 and Cov(W, U) = 1/2, those of W_1 and of the integral of W over
    [0, 1]; read off on unit vectors."""
    unit = torch.eye(2, **DOUBLE)[:, :, None]
    ts = UNEVEN[:2].flip(0) if backwards else UNEVEN[:2]
    clock = Clock(OU(), torch.zeros(1, 1, **DOUBLE), ts, "srk", "ito")
    increments = Increments(clock, lambda k, draw: unit[draw], True)
    w, u = increments(torch.zeros(()), torch.ones(()), return_U=True)
    assert torch.equal(increments(torch.zeros(()), torch.ones(())), w)
    law = torch.cat((w, u), 1).T @ torch.cat((w, u), 1)
    torch.testing.assert_close(law, torch.tensor([[1, 1 / 2], [1 / 2, 1 / 3]], **DOUBLE))


LEVY = 20_000
"""Samples of a Levy area; the bounds below are 4.5 standard errors, 7e-6 each."""


def areas(samples=LEVY, fine=64):
    """W, H and A over [0, 1] of two Wiener processes, by `fine` steps; A to its own 1/fine."""
    dw = torch.randn(fine, 2, samples, **DOUBLE) / fine**0.5
    before = dw.cumsum(0) - dw
    w = dw.sum(0)
    h = (before + dw / 2).mean(0) - w / 2
    levy = (before[:, 0] * dw[:, 1] - before[:, 1] * dw[:, 0]).sum(0) / 2
    return w, h, levy


@pytest.mark.parametrize("made", [False, True])
def test_the_levy_area_has_its_mean_and_variance_given_increment_and_integral(made):
    """A - (H_1 W_2 - W_1 H_2) has mean 0 and variance 1/20 + (H_1^2 + H_2^2)/5: of simulated areas,
    and of those that log_ode is given."""
    if made:
        normals = torch.randn(3, LEVY, 2, **DOUBLE)
        clock = Clock(Rotating(), torch.zeros(LEVY, 2, **DOUBLE), UNEVEN[:2], "log_ode", "ito")
        w, levy = Increments(clock, lambda k, draw: normals[draw], True)(
            torch.zeros(()), torch.ones(()), return_A=True
        )
        assert torch.equal(levy, -levy.mT)
        w, h, levy = w.T, normals[1].T / 12**0.5, levy[:, 0, 1]
    else:
        w, h, levy = areas()
    rest = levy - (h[0] * w[1] - w[0] * h[1])
    squares = (h**2).sum(0)
    design = torch.stack((torch.ones_like(squares), squares), 1)
    predicted = design @ torch.tensor([1 / 20, 1 / 5], **DOUBLE)
    assert abs(rest.mean()) < 4.5 * (rest.var() / LEVY) ** 0.5
    excess = rest**2 - predicted
    for weight in (torch.ones_like(squares), squares, w[0] * w[1]):
        product = excess * weight
        bound = 4.5 * product.std() / LEVY**0.5
        assert abs(product.mean()) < bound + (0 if made else 1 / (12 * 64) * weight.abs().mean())


def test_the_library_s_own_variance_of_the_levy_area_is_not_that():
    """torchsde has 1/50 for 1/20: the planted fault of the theorem above."""
    w, h, levy = areas()
    excess = (levy - (h[0] * w[1] - w[0] * h[1])) ** 2 - (1 / 50 + (h**2).sum(0) / 5)
    assert excess.mean() > 20 * excess.std() / LEVY**0.5
