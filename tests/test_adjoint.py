"""Gradients by backpropagation, and by the adjoints of torchsde and torchdiffeq."""

import math

import pytest
import torch

from sdeflow import (
    SDE,
    VP,
    ArgumentError,
    BrownianPath,
    PairingError,
    TorchDiffEq,
    TorchSDE,
    integrate,
    probability_flow,
    reverse,
)
from sdeflow.backends import ODE_METHODS, SDE_METHODS
from sdeflow.grid import log_snr

DOUBLE = {"dtype": torch.float64}
FINE = torch.linspace(0, 1, 129, **DOUBLE) ** 1.3
EVEN = torch.linspace(0, 1, 129, **DOUBLE)
PAIRS = [(m, noise) for m in SDE_METHODS for noise in ("elementwise", "scalar")]
PAIRS += [(m, "matrix") for m, known in SDE_METHODS.items() if known.matrix]


def number(value):
    return torch.tensor(value, **DOUBLE, requires_grad=True)


class Geometric(SDE):
    """Geometric Brownian motion whose parameters want gradients."""

    def __init__(self, noise="elementwise"):
        self.noise, self.mu, self.sigma = noise, number(0.3), number(0.7)

    def drift(self, x, t):
        return self.mu * x

    def diffusion(self, x, t):
        return self.sigma * x if self.noise != "matrix" else torch.diag_embed(self.sigma * x)

    def gradients(self, x, w):
        """Of the sum of X_1 = x exp(mu - sigma^2/2 + sigma w): with respect to x, mu and sigma."""
        slope = torch.exp(self.mu - self.sigma**2 / 2 + self.sigma * w)
        end = x * slope
        return slope, end.sum(), ((w - self.sigma) * end).sum()


def difference(one, other):
    return max(float((a - b).detach().abs().max()) for a, b in zip(one, other, strict=True))


def gradients(process, x, ts, solver, wanted, noise=None, keep=False):
    run = integrate(process, x, ts, solver, noise=noise, grad=True, keep=keep)
    return torch.autograd.grad(run.x.sum(), (x, *wanted))


# ---- torchsde


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize(("method", "noise"), PAIRS)
def test_gradients_are_those_of_the_solution_as_steps_shrink(method, adjoint, noise):
    """On one path, on uneven steps, with a start that is a leaf: x, mu and sigma of a GBM."""
    sde, solver = Geometric(noise), TorchSDE(method, adjoint=adjoint)
    path = BrownianPath(3, (200, 1) if noise == "scalar" else (200, 2), FINE)
    x = torch.linspace(0.5, 1.5, 400, **DOUBLE).view(200, 2).requires_grad_()
    exact = sde.gradients(x, path.increment(0.0, 1.0)[0])
    wanted = (sde.mu, sde.sigma)

    def error(n):
        made = gradients(sde, x, FINE[:: 128 // n], solver, wanted, path)
        return float((made[0] - exact[0]).detach().square().mean().sqrt()) + sum(
            float((a - b).detach().abs()) / 400 for a, b in zip(made[1:], exact[1:], strict=True)
        )

    coarse, fine = error(8), error(64)
    slow = method == "euler" or (adjoint and SDE_METHODS[method].calculus == "ito")
    order = 0.5 if slow else 1.0
    assert fine < (0.3 if slow else 0.1)
    assert coarse / fine > 8 ** (order - 0.2)


class Tangled(SDE):
    """Noise of each kind that couples components, in front of a network."""

    def __init__(self, noise):
        torch.manual_seed(5)
        self.noise, self.net = noise, torch.nn.Linear(2, 2).double()
        self.scale = number(0.4)

    def drift(self, x, t):
        return torch.tanh(self.net(x)) * (1 + t)

    def diffusion(self, x, t):
        if self.noise == "matrix":
            return torch.stack((self.scale * x, 0.3 * torch.cos(x.flip(1)), 0.1 + 0 * x), -1)
        if self.noise == "scalar":
            return self.scale * torch.sin(x.flip(1)) + 0.1
        return self.scale * torch.sin(x) + 0.2

    @property
    def wanted(self):
        return (*self.net.parameters(), self.scale)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("noise", ["elementwise", "scalar", "matrix"])
def test_the_adjoint_of_reversible_heun_is_backpropagation_to_rounding(noise, keep):
    """On steps of three lengths, each of which a stretch: slopes are carried over from each."""
    sde = Tangled(noise)
    ts = torch.tensor([0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.75, 0.8], **DOUBLE)
    x = torch.randn(4, 2, **DOUBLE, requires_grad=True)

    def all_states(adjoint):
        solver = TorchSDE("reversible_heun", adjoint=adjoint)
        run = integrate(sde, x, ts, solver, seed=1, grad=True, keep=keep)
        total = ((run.path if keep else run.x) ** 2).sum()
        return run.x, *torch.autograd.grad(total, (x, *sde.wanted))

    assert difference(all_states(True), all_states(False)) < 1e-12


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("noise", ["elementwise", "scalar", "matrix"])
@pytest.mark.parametrize("method", ["euler", "midpoint"])
def test_the_adjoint_approaches_backpropagation(method, noise, keep):
    sde, shape = Tangled(noise), {"scalar": (4, 1), "matrix": (4, 3)}.get(noise, (4, 2))
    path = BrownianPath(2, shape, EVEN)
    x = torch.randn(4, 2, **DOUBLE, requires_grad=True)

    def apart(n):
        made = [
            gradients(sde, x, EVEN[:: 128 // n], solver, sde.wanted, path, keep)
            for solver in (TorchSDE(method, adjoint=True), TorchSDE(method))
        ]
        return difference(*made)

    assert apart(128) < (0.7 if method == "euler" else 0.25) * apart(8)


@pytest.mark.parametrize("method", SDE_METHODS)
def test_the_adjoint_s_run_is_the_same_run(method):
    """From a seed, a path and any other source of noise; every state of it."""
    ts = torch.tensor([0.0, 0.1, 0.2, 0.5, 0.6, 1.0], **DOUBLE)
    x = torch.randn(3, 2, **DOUBLE)
    process = Tangled("elementwise")

    def states(**options):
        def fresh(t, s):
            return torch.randn(3, 2, **DOUBLE, generator=generator)

        generator = torch.Generator().manual_seed(0)
        for source in ({"seed": 1}, {"noise": BrownianPath(1, (3, 2), ts)}, {"noise": fresh}):
            yield integrate(process, x, ts, TorchSDE(method, **options), keep=True, **source).path
            yield integrate(
                process, x, ts, TorchSDE(method, **options), keep=True, grad=True, **source
            ).path

    for plain, adjoint in zip(states(), states(adjoint=True), strict=True):
        torch.testing.assert_close(plain, adjoint, rtol=1e-12, atol=1e-12)


def test_no_global_generator_is_moved_by_an_adjoint():
    sde = Tangled("matrix")
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), **DOUBLE, requires_grad=True)
    state, solver = torch.get_rng_state(), TorchSDE("log_ode", adjoint=True)
    gradients(sde, x, EVEN[::16], solver, sde.wanted)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("adjoint_method", ["euler_heun", "heun", "midpoint"])
def test_the_method_backwards_is_free(adjoint_method):
    sde = Geometric()
    path = BrownianPath(3, (50, 2), EVEN)
    x = torch.ones(50, 2, **DOUBLE, requires_grad=True)
    solver = TorchSDE("midpoint", adjoint=True, adjoint_method=adjoint_method)
    made = gradients(sde, x, EVEN, solver, (sde.mu, sde.sigma), path)
    exact = sde.gradients(x, path.increment(0.0, 1.0)[0])
    assert difference(made[:1], exact[:1]) < 0.2
    assert difference(made[1:], exact[1:]) < 0.02 * float(exact[1].detach())


REVERSIBLE = {"method": "reversible_heun", "adjoint": True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adjoint_method": "heun"}, "adjoint_method='heun' needs adjoint=True"),
        (REVERSIBLE | {"adjoint_method": "heun"}, "other than reversible_heun"),
        ({"adjoint": True, "adjoint_method": "heun"}, r"'heun' is unknown; there are: euler, mil"),
        ({"parameters": torch.ones(2)}, r"parameters \(Tensor\) must be a tuple of tensors"),
        ({"parameters": (1.0,)}, "must be a tuple of tensors"),
    ],
)
def test_a_bad_option_is_refused_by_name(options, message):
    with pytest.raises(ArgumentError, match=message):
        TorchSDE(**options)


def test_milstein_backwards_is_refused_on_other_than_elementwise_noise():
    solver = TorchSDE("euler", adjoint=True, adjoint_method="milstein")
    with pytest.raises(PairingError, match="adjoint_method='milstein' takes elementwise noise"):
        integrate(Tangled("scalar"), torch.ones(2, 2), EVEN, solver)


# ---- which parameters

SCALE = number(1.5)


def closure(net):
    return lambda x, t: net(x) * SCALE


@pytest.mark.parametrize("solver", [TorchSDE("midpoint"), TorchDiffEq("rk4")], ids=repr)
def test_parameters_are_found_in_closures_globals_and_behind_computed_coefficients(solver):
    net, log_theta = torch.nn.Linear(2, 2).double(), number(-1.0)
    theta = log_theta.exp()
    score = closure(net)
    sde = probability_flow if isinstance(solver, TorchDiffEq) else reverse
    process = sde(VP(), lambda x, t: -theta * x + score(x, t))
    x = torch.randn(4, 2, **DOUBLE, requires_grad=True)
    wanted = (SCALE, log_theta, *net.parameters())
    ts = log_snr(VP(), 60, t_max=0.6, t_min=0.2)

    def made(solver):
        run = integrate(process, x, ts, solver, seed=1, grad=True)
        return torch.autograd.grad(run.x.square().sum(), (x, *wanted), retain_graph=True)

    adjoint = type(solver)(solver.method, adjoint=True)
    explicit = type(solver)(solver.method, adjoint=True, parameters=wanted)
    sizes = [float(gradient.abs().max()) for gradient in made(solver)]
    for other in (adjoint, explicit):
        for one, two, size in zip(made(solver), made(other), sizes, strict=True):
            assert float((one - two).abs().max()) < 0.05 * size


def test_what_the_start_was_made_of_gets_its_gradient_through_the_start():
    weight = number(2.0)
    x = weight * torch.ones(3, 1, **DOUBLE)
    solver = TorchSDE("reversible_heun", adjoint=True)
    run = integrate(Geometric(), x, EVEN[::8], solver, seed=1, grad=True)
    (slope,) = torch.autograd.grad(run.x.sum(), weight)
    assert float(slope) == pytest.approx(float(run.x.detach().sum()) / 2, rel=1e-12)


# ---- memory


class Box:
    """A tensor kept for the way back, counted while it is alive."""

    live = peak = 0

    def __init__(self, tensor):
        self.tensor, self.size = tensor.detach(), tensor.numel()
        Box.live += self.size
        Box.peak = max(Box.peak, Box.live)

    def __del__(self):
        Box.live -= self.size


def peak(run):
    Box.live = Box.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(Box, lambda box: box.tensor):
        run().sum().backward()
    return Box.peak


@pytest.mark.parametrize("solver", [TorchSDE("midpoint"), TorchDiffEq("rk4")], ids=repr)
def test_an_adjoint_keeps_no_more_for_more_steps(solver):
    net = torch.nn.Linear(8, 8)
    sde = probability_flow if isinstance(solver, TorchDiffEq) else reverse
    process = sde(VP(), lambda x, t: net(torch.tanh(x)))
    x = torch.randn(16, 8, requires_grad=True)

    def kept(solver, steps):
        ts = log_snr(VP(), steps, t_max=0.6, t_min=0.2)
        return peak(lambda: integrate(process, x, ts, solver, seed=1, grad=True).x)

    adjoint = type(solver)(solver.method, adjoint=True)
    assert kept(adjoint, 64) == kept(adjoint, 8)
    assert kept(solver, 64) > 7 * kept(solver, 8)  # by backpropagation, which must be seen
    assert kept(adjoint, 64) < kept(solver, 8)


# ---- torchdiffeq


class Linear(SDE):
    """dx/dt = a cos(t) x, so that x_t = x_0 exp(a (sin t - sin t_0)), either way."""

    direction = 0

    def __init__(self):
        self.a = number(1.3)

    def drift(self, x, t):
        return self.a * math.cos(float(t)) * x

    def diffusion(self, x, t):
        return torch.zeros_like(x)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("method", ODE_METHODS)
def test_the_gradients_of_an_ode_are_those_of_its_solution(method, backwards, keep):
    ode, ts = Linear(), torch.linspace(0, 1, 81, **DOUBLE)
    ts = ts.flip(0) if backwards else ts
    x = torch.tensor([[1.0, -0.5], [2.0, 0.3]], **DOUBLE, requires_grad=True)
    span = math.sin(float(ts[-1])) - math.sin(float(ts[0]))
    growth = torch.exp(ode.a * span)
    exact = (growth.expand(2, 2), span * growth * x.sum())
    for adjoint in (True,) if method == "scipy_solver" else (True, False):
        solver = TorchDiffEq(method, 1e-6, 1e-6, adjoint=adjoint)
        made = gradients(ode, x, ts, solver, (ode.a,), keep=keep)
        order, fixed = ODE_METHODS[method]
        bound = {1: 0.05, 2: 1e-3}.get(order, 1e-4) if fixed else 1e-3
        for one, two in zip(made, exact, strict=True):
            torch.testing.assert_close(one, two.detach(), rtol=bound, atol=0)


def test_an_adaptive_method_is_differentiated_as_sharply_as_it_is_run():
    """The step sizes are no functions of the start, though their choice reads it."""

    class Forced(Linear):
        def drift(self, x, t):
            return torch.tanh(self.a * x) * torch.cos(3 * t)

    ode, ts = Forced(), torch.tensor([0.0, 1.0], **DOUBLE)
    x = torch.linspace(-1, 1, 6, **DOUBLE).view(3, 2).requires_grad_()
    fine = torch.linspace(0, 1, 401, **DOUBLE)
    exact = gradients(ode, x, fine, TorchDiffEq("rk4"), (ode.a,))
    for adjoint in (False, True):
        made = gradients(ode, x, ts, TorchDiffEq("dopri5", 1e-9, 1e-9, adjoint=adjoint), (ode.a,))
        assert difference(made, exact) < 1e-8


def test_scipy_is_refused_where_gradients_must_flow_through_its_steps():
    x = torch.ones(1, 1, **DOUBLE, requires_grad=True)
    with pytest.raises(PairingError, match="scipy_solver leaves torch.*adjoint=True"):
        integrate(Linear(), x, EVEN, TorchDiffEq("scipy_solver"), grad=True)
