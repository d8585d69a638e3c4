"""The solvers for noise that depends on the state: formulas, refusals, and every kind of process.

Their orders are in test_strong_orders.py and test_weak_orders.py.
"""

import math

import pytest
import torch

from sdeflow import (
    GBM,
    OU,
    SDE,
    SRK,
    VP,
    BrownianPath,
    EulerHeun,
    EulerMaruyama,
    Heun,
    Milstein,
    PairingError,
    Platen,
    TorchSDE,
    get,
    integrate,
    probability_flow,
    reverse,
)
from sdeflow.grid import log_snr
from sdeflow.solvers import require_commuting
from sdeflow.testing import KNOWN

DOUBLE = {"dtype": torch.float64}
UNEVEN = torch.tensor([0.0, 0.1, 0.15, 0.4, 1.0], **DOUBLE)
ALL = (EulerMaruyama(), Milstein(), EulerHeun(), Heun(), SRK(), Platen())
NEW = ALL[1:]


class Wavy(SDE):
    """Elementwise noise that depends on the state and the time."""

    def drift(self, x, t):
        return -x + t

    def diffusion(self, x, t):
        return (1 + t) * (0.5 + 0.3 * torch.sin(x))


class WavyStratonovich(Wavy):
    calculus = "stratonovich"


class WavyScalar(Wavy):
    noise = "scalar"


class WavyColumn(Wavy):
    """The scalar noise as a matrix of one column, which commutes."""

    noise, commutative = "matrix", True

    def diffusion(self, x, t):
        return super().diffusion(x, t).unsqueeze(-1)


class WavyMatrix(Wavy):
    """The elementwise noise of a vector as a diagonal matrix, which commutes."""

    noise, commutative = "matrix", True

    def diffusion(self, x, t):
        return torch.diag_embed(super().diffusion(x, t))


class Rotating(Wavy):
    """Two columns that commute, and whose derivatives mix the components."""

    noise, commutative = "matrix", True

    def diffusion(self, x, t):
        return (1 + t) * torch.stack((x, torch.stack((-x[:, 1], x[:, 0]), 1)), 2)


class Shear(Wavy):
    """Two columns that do not commute."""

    noise = "matrix"

    def diffusion(self, x, t):
        one = torch.ones_like(x[:, 0])
        return torch.stack((torch.stack((one, 0 * one), 1), torch.stack((0 * one, x[:, 0]), 1)), 2)


class SaidToCommute(Shear):
    commutative = True


class Coupled(Wavy):
    """Elementwise noise whose g_i looks at the other component."""

    def diffusion(self, x, t):
        return 1 + x.flip(1) ** 2


class Linear(Wavy):
    """Noise that is additive, a matrix and a function of time."""

    noise, additive = "matrix", True

    def diffusion(self, x, t):
        return (1 + t) * x.new_tensor([[1.0, 0.5, 0.0], [0.2, 0.3, 1.0]]).expand(len(x), 2, 3)


class Drawn:
    """Given normals and areas, call by call."""

    def __init__(self, z, zeta):
        self.z, self.zeta = iter(z), iter(zeta)

    def __call__(self, t, s):
        return next(self.z)

    def area(self, t, s):
        return next(self.zeta)


def named(value):
    """A test's id, the same in every process."""
    return type(value).__name__


def normals(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **DOUBLE)


# ---- each is its textbook formula, on Wavy with noise (1 + t)(0.5 + 0.3 sin x)


def g(x, t):
    return (1 + t) * (0.5 + 0.3 * torch.sin(x))


def dg(x, t):
    return (1 + t) * 0.3 * torch.cos(x)


def f(x, t):
    return -x + t


def milstein(x, t, h, z, zeta):
    dw = h**0.5 * z
    return x + f(x, t) * h + g(x, t) * dw + g(x, t) * dg(x, t) * (dw**2 - h) / 2


def b(x, t):
    """The Stratonovich drift."""
    return f(x, t) - g(x, t) * dg(x, t) / 2


def euler_heun(x, t, h, z, zeta):
    dw = h**0.5 * z
    ahead = x + g(x, t) * dw
    return x + b(x, t) * h + (g(x, t) + g(ahead, t + h)) / 2 * dw


def heun(x, t, h, z, zeta):
    dw = h**0.5 * z
    u = x + b(x, t) * h + g(x, t) * dw
    return x + (b(x, t) + b(u, t + h)) / 2 * h + (g(x, t) + g(u, t + h)) / 2 * dw


def platen(x, t, h, z, zeta):
    dw, base = h**0.5 * z, x + f(x, t) * h
    up, down = g(base + g(x, t) * h**0.5, t + h), g(base - g(x, t) * h**0.5, t + h)
    moved = x + (f(x, t) + f(base + g(x, t) * dw, t + h)) * h / 2
    return moved + (up + down + 2 * g(x, t)) * dw / 4 + (up - down) * (dw**2 - h) / (4 * h**0.5)


def sri1w1(x, t, h, z, zeta):
    """From its tableau, Roessler (2010), by the general formula of an SRI method."""
    c0, c1 = (0, 3 / 4, 0, 0), (0, 1 / 4, 1, 1 / 4)
    a0, b0 = {(1, 0): 3 / 4}, {(1, 0): 3 / 2}
    a1 = {(1, 0): 1 / 4, (2, 0): 1, (3, 2): 1 / 4}
    b1 = {(1, 0): 1 / 2, (2, 0): -1, (3, 0): -5, (3, 1): 3, (3, 2): 1 / 2}
    alpha = (1 / 3, 2 / 3, 0, 0)
    beta = ((-1, 4 / 3, 2 / 3, 0), (-1, 4 / 3, -1 / 3, 0), (2, -4 / 3, -2 / 3, 0))
    beta = (*beta, (-2, 5 / 3, -2 / 3, 1))
    i1 = h**0.5 * z
    i10 = h**1.5 * (z + zeta / 3**0.5) / 2
    integrals = (i1, (i1**2 - h) / 2 / h**0.5, i10 / h, (i1**3 - 3 * h * i1) / 6 / h)
    drifts, kicks = [], []
    for i in range(4):
        h0, h1 = x, x
        for j in range(i):
            h0 = h0 + a0.get((i, j), 0) * drifts[j] * h + b0.get((i, j), 0) * kicks[j] * i10 / h
            h1 = h1 + a1.get((i, j), 0) * drifts[j] * h + b1.get((i, j), 0) * kicks[j] * h**0.5
        drifts.append(f(h0, t + c0[i] * h))
        kicks.append(g(h1, t + c1[i] * h))
    for i in range(4):
        weight = sum(beta[k][i] * integrals[k] for k in range(4))
        x = x + alpha[i] * drifts[i] * h + weight * kicks[i]
    return x


FORMULAS = {Milstein(): milstein, EulerHeun(): euler_heun, Heun(): heun}
FORMULAS |= {Platen(): platen, SRK(): sri1w1}


@pytest.mark.parametrize("solver", NEW, ids=repr)
def test_a_solver_is_its_textbook_formula(solver):
    x, z, zeta = normals(5, 2), normals(4, 5, 2, seed=1), normals(4, 5, 2, seed=2)
    made = integrate(Wavy(), x, UNEVEN, solver, noise=Drawn(z, zeta), keep=True).path
    for k in range(4):
        x = FORMULAS[solver](x, UNEVEN[k], UNEVEN[k + 1] - UNEVEN[k], z[k], zeta[k])
        torch.testing.assert_close(made[k + 1], x, rtol=1e-12, atol=1e-12)


def test_srk_on_additive_noise_is_sra1():
    x, z, zeta = normals(5, 2), normals(1, 5, 3, seed=1), normals(1, 5, 3, seed=2)
    t, s = torch.tensor([0.2, 0.5], **DOUBLE)
    made = integrate(Linear(), x, torch.stack((t, s)), SRK(), noise=Drawn(z, zeta)).x
    h, matrix = 0.3, x.new_tensor([[1.0, 0.5, 0.0], [0.2, 0.3, 1.0]])
    i1, i10 = h**0.5 * z[0], h**1.5 * (z[0] + zeta[0] / 3**0.5) / 2
    u = x + 3 / 4 * f(x, t) * h + 3 / 2 * (1 + s) * i10 / h @ matrix.T
    x = x + h * (f(x, t) / 3 + 2 / 3 * f(u, t + 3 / 4 * h))
    x = x + ((1 + s) * (i1 - i10 / h) + (1 + t) * i10 / h) @ matrix.T
    torch.testing.assert_close(made, x, rtol=1e-12, atol=1e-12)


SAME = {
    # torchsde's method: ours, and the SDE on which they are one scheme
    "milstein": (Milstein(), Wavy()),
    "euler_heun": (EulerHeun(), Wavy()),
    "heun": (Heun(), Wavy()),
    "srk": (SRK(), Linear()),
}


@pytest.mark.parametrize("method", SAME)
def test_a_scheme_that_torchsde_has_too_gives_its_numbers(method):
    pytest.importorskip("torchsde")
    solver, sde = SAME[method]
    x = normals(6, 2)
    path = BrownianPath(4, sde.noise_shape(x), UNEVEN)
    theirs = integrate(sde, x, UNEVEN, TorchSDE(method), noise=path).x
    ours = integrate(sde, x, UNEVEN, solver, noise=path).x
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# ---- the kinds of noise agree where they are the same


@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_scalar_noise_on_one_component_is_elementwise(solver):
    x = normals(6, 1)
    path = BrownianPath(4, (6, 1), UNEVEN)
    one, other = (integrate(sde, x, UNEVEN, solver, noise=path).x for sde in (Wavy(), WavyScalar()))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", [s for s in ALL if s != SRK()], ids=repr)
def test_a_matrix_of_one_column_is_scalar_noise(solver):
    x = normals(6, 3)
    path = BrownianPath(4, (6, 1), UNEVEN)
    one, other = (
        integrate(sde, x, UNEVEN, solver, noise=path).x for sde in (WavyScalar(), WavyColumn())
    )
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", [s for s in ALL if s != SRK()], ids=repr)
def test_a_diagonal_matrix_is_elementwise_noise(solver):
    x = normals(6, 3)
    path = BrownianPath(4, (6, 3), UNEVEN)
    one, other = (integrate(sde, x, UNEVEN, solver, noise=path).x for sde in (Wavy(), WavyMatrix()))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_milstein_on_commuting_matrices_is_the_double_integral():
    """1/2 sum_kl (dg_k) g_l (dw_k dw_l - h delta_kl), the derivatives written out."""
    x, z = normals(5, 2), normals(1, 5, 2, seed=1)
    ts = torch.tensor([0.2, 0.5], **DOUBLE)
    made = integrate(Rotating(), x, ts, Milstein(), noise=Drawn(z, z)).x
    maps = 1.2 * torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, -1.0], [1.0, 0.0]]], **DOUBLE)
    h, dw = 0.3, 0.3**0.5 * z[0]
    expected = x + h * f(x, 0.2)
    for k in range(2):
        expected = expected + dw[:, [k]] * (x @ maps[k].T)
        for j in range(2):
            double = (dw[:, [k]] * dw[:, [j]] - h * (k == j)) / 2
            expected = expected + double * (x @ (maps[k] @ maps[j]).T)
    torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)


# ---- refusals, by name, before the first drift


REFUSED = {
    # solver, SDE: what is said
    (Milstein(), Shear()): r"Milstein .*Shear.* not known to commute; use EulerMaruyama\(\)",
    (Milstein(), SaidToCommute()): r"Milstein: .*declared commutative.* use EulerMaruyama\(\)",
    (Milstein(), Coupled()): r"Milstein needs .* g_i that looks at x_i alone.* EulerHeun\(\)",
    (SRK(), Shear()): r"SRK .*Shear.* matrix noise that may depend on the state; use Milstein\(\)",
    (SRK(), Rotating()): r"SRK .*Rotating.* matrix noise that may depend on the state",
    (SRK(), Coupled()): r"SRK needs .* g_i that looks at x_i alone.* use EulerMaruyama\(\)",
    (Platen(), Coupled()): r"Platen needs .* g_i that looks at x_i alone.* EulerHeun\(\)",
}


@pytest.mark.parametrize(
    "case", REFUSED, ids=lambda case: f"{type(case[0]).__name__}-{type(case[1]).__name__}"
)
def test_noise_that_a_solver_cannot_take_is_refused_by_name(case):
    solver, sde = case
    asked = []
    sde = type(sde)()
    sde.drift = lambda x, t: asked.append(t)
    with pytest.raises(PairingError, match=REFUSED[case]):
        integrate(sde, normals(3, 2), UNEVEN, solver, seed=1)
    assert asked == []


@pytest.mark.parametrize("solver", [EulerMaruyama(), EulerHeun(), Heun()], ids=repr)
@pytest.mark.parametrize("sde", [Shear(), Coupled(), Rotating()], ids=named)
def test_what_is_named_instead_takes_any_noise(solver, sde):
    end = integrate(sde, 0.1 * normals(3, 2), torch.linspace(0, 1, 65), solver, seed=1).x
    assert end.isfinite().all()


def test_a_look_at_the_noise_lets_through_what_commutes():
    for sde in (Wavy(), WavyScalar(), WavyMatrix(), Rotating(), Linear()):
        require_commuting(Milstein(), sde, normals(4, 2), UNEVEN[0])
        require_commuting(Milstein(), sde, normals(0, 2), UNEVEN[0])


def test_the_strong_order_is_that_of_the_noise():
    additive, diagonal, shear = OU(), Wavy(), Shear()
    expected = {
        EulerMaruyama(): (1, 0.5, 0.5),
        EulerHeun(): (1, 1, 0.5),
        Heun(): (1, 1, 0.5),
        Platen(): (1, 1, 0.5),
    }
    for solver, orders in expected.items():
        assert tuple(map(solver.strong_order_on, (additive, diagonal, shear))) == orders
    assert Milstein().strong_order_on(Rotating()) == 1
    assert SRK().strong_order_on(diagonal) == 1.5


# ---- down in time


class Flipped(SDE):
    """A forward SDE run down in time: x at t is that of the other at 1 - t."""

    direction = -1

    def __init__(self, forward):
        self.forward = forward
        self.noise, self.additive = forward.noise, forward.additive
        self.calculus, self.commutative = forward.calculus, forward.commutative

    def drift(self, x, t):
        return -self.forward.drift(x, 1 - t)

    def diffusion(self, x, t):
        return self.forward.diffusion(x, 1 - t)


FLIPPED = [Wavy(), WavyStratonovich(), WavyScalar(), Rotating(), Shear(), Linear()]


@pytest.mark.parametrize("sde", FLIPPED, ids=named)
@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_a_run_down_in_time_is_the_forward_run_of_the_flipped_process(solver, sde):
    """To rounding, path by path: the signs of h, of the double integrals and of the correction
    between the calculi are all right."""
    try:
        solver.check(sde)
    except PairingError:
        return
    x = normals(5, 2)
    shape = (4, *sde.noise_shape(x))
    z, zeta = normals(*shape, seed=1), normals(*shape, seed=2)
    up = integrate(sde, x, UNEVEN, solver, noise=Drawn(z, zeta)).x
    down = integrate(Flipped(sde), x, 1 - UNEVEN, solver, noise=Drawn(z, zeta)).x
    torch.testing.assert_close(down, up, rtol=1e-11, atol=1e-11)


def test_a_correction_of_the_wrong_sign_down_in_time_would_be_seen():
    class Unsigned(Flipped):
        def drift(self, x, t):  # the forward sign of the correction, twice undone
            h = self.forward.diffusion(x, 1 - t)
            slope = (2 - t) * 0.3 * torch.cos(x)
            return super().drift(x, t) + h * slope

    x, z, zeta = normals(5, 2), normals(4, 5, 2, seed=1), normals(4, 5, 2, seed=2)
    up = integrate(Wavy(), x, UNEVEN, EulerHeun(), noise=Drawn(z, zeta)).x
    down = integrate(Unsigned(Wavy()), x, 1 - UNEVEN, EulerHeun(), noise=Drawn(z, zeta)).x
    assert (up - down).abs().max() > 0.1


def gbm_score(x, t):
    """Of GBM(0.2, 0.5) from the log-normal law with log x_0 ~ N(0, 0.1)."""
    mean, variance = (0.2 - 0.125) * t, 0.1 + 0.25 * t
    return -(1 + (x.log() - mean) / variance) / x


@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_the_reverse_of_state_dependent_noise_returns_the_law(solver):
    """log x_0 ~ N(0, 0.1) from log x_1, 20,000 paths in 50 steps: mean and variance within 0.02
    (8 standard errors of the mean; the error of the steps is below 0.01)."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(20_000, 1, generator=generator, **DOUBLE)
    x = torch.exp(0.075 + 0.35**0.5 * z)
    process = reverse(GBM(0.2, 0.5), gbm_score)
    log_x = integrate(process, x, torch.linspace(1, 0, 51, **DOUBLE), solver, seed=2).x.log()
    assert abs(float(log_x.mean())) < 0.02
    assert abs(float(log_x.var()) - 0.1) < 0.02


# ---- any state, any precision, no noise


@pytest.mark.parametrize("sde", [Wavy(), WavyStratonovich()], ids=lambda sde: sde.calculus)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_states_of_any_rank_are_their_components(solver, shape, sde):
    x = normals(4, *shape)
    many = integrate(sde, x, UNEVEN, solver, seed=1).x
    flat = integrate(sde, x.reshape(4, -1), UNEVEN, solver, seed=1).x
    torch.testing.assert_close(many, flat.reshape(x.shape), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_scalar_noise_moves_states_of_any_rank(solver, shape):
    x = normals(4, *shape)
    many = integrate(WavyScalar(), x, UNEVEN, solver, seed=1).x
    flat = integrate(WavyScalar(), x.reshape(4, -1), UNEVEN, solver, seed=1).x
    torch.testing.assert_close(many, flat.reshape(x.shape), rtol=1e-13, atol=1e-13)


class Broad(WavyColumn):
    """Matrix noise on states of any rank: g and its square, which do not commute."""

    commutative = False

    def diffusion(self, x, t):
        g = super().diffusion(x, t)
        return torch.cat((g, g**2, 1 + 0 * g), -1)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
@pytest.mark.parametrize("solver", [EulerMaruyama(), EulerHeun(), Heun(), Platen()], ids=repr)
def test_matrix_noise_moves_states_of_any_rank(solver, shape):
    x = normals(4, *shape)
    many = integrate(Broad(), x, UNEVEN, solver, seed=1).x
    flat = integrate(Broad(), x.reshape(4, -1), UNEVEN, solver, seed=1).x
    torch.testing.assert_close(many, flat.reshape(x.shape), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sde", [Wavy(), WavyScalar(), Rotating(), Shear()], ids=named)
@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_the_precision_of_the_state_is_kept(solver, sde, dtype):
    try:
        solver.check(sde)
    except PairingError:
        return
    x = normals(6, 2)
    path = BrownianPath(4, sde.noise_shape(x), UNEVEN)
    exact = integrate(sde, x, UNEVEN, solver, noise=path).x
    low = integrate(sde, x.to(dtype), UNEVEN, solver, noise=path).x
    assert low.dtype == dtype
    error = (low.double() - exact).abs().max() / exact.abs().max()
    assert error < 40 * torch.finfo(dtype).eps


@pytest.mark.parametrize("sde", [Wavy(), WavyScalar(), Rotating(), Shear(), Linear()], ids=named)
@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_an_empty_batch_stays_empty(solver, sde):
    try:
        solver.check(sde)
    except PairingError:
        return
    assert integrate(sde, torch.zeros(0, 2), UNEVEN, solver, seed=1).x.shape == (0, 2)


@pytest.mark.parametrize("solver", NEW, ids=repr)
def test_an_ode_is_followed_without_noise(solver):
    def silent(t, s):
        raise AssertionError("noise was drawn")

    flow = probability_flow(VP(), lambda x, t: -2 * x)
    x, ts = normals(4, 3), log_snr(VP(), 200, t_min=0.1, t_max=0.9)
    end = integrate(flow, x, ts, solver, noise=silent).x
    exact = x * math.exp(-(0.1 * 0.8 + 19.9 * (0.81 - 0.01) / 2) / 2)
    torch.testing.assert_close(end, exact, rtol=0.08, atol=0)


@pytest.mark.parametrize("solver", NEW, ids=repr)
def test_a_reverse_gaussian_runs_from_its_tableau_with_the_path_s_own_areas(solver):
    """Fused and plain runs see one Brownian path, and its areas, alike."""
    ts = log_snr(VP(), 8, t_max=0.9)
    process, x = reverse(VP(), lambda x, t: -torch.tanh(x)), normals(4, 3)
    path = BrownianPath(4, (4, 3), ts)
    fused = integrate(process, x, ts, solver, noise=path)
    plain = integrate(process, x, ts, solver, noise=path, grad=True)
    assert fused.fused and not plain.fused
    torch.testing.assert_close(fused.x, plain.x, rtol=1e-11, atol=1e-11)
    assert fused.nfe == plain.nfe == 8 * solver.evaluations


@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_drifts_a_step_are_as_many_as_declared(solver):
    for sde in (Wavy(), WavyScalar(), OU()):
        run = integrate(sde, normals(3, 2), UNEVEN, solver, seed=1)
        assert run.nfe == 4 * solver.evaluations


@pytest.mark.parametrize("sde", [Wavy(), WavyScalar(), Rotating()], ids=named)
@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_gradients_reach_the_state_and_the_parameters_of_the_noise(solver, sde):
    """Against differences, through the derivatives of g that a step itself takes."""
    try:
        solver.check(sde)
    except PairingError:
        return

    def end(scale, x):
        class Scaled(type(sde)):
            def diffusion(self, x, t):
                return scale * super().diffusion(x, t)

        path = BrownianPath(4, sde.noise_shape(x), UNEVEN)
        return integrate(Scaled(), x, UNEVEN, solver, noise=path, grad=True).x.square().sum()

    scale, x = torch.ones((), **DOUBLE), normals(3, 2)
    parts = torch.autograd.grad(
        end(scale.requires_grad_(), x.requires_grad_()), (scale, x), materialize_grads=True
    )
    v, h = normals(3, 2, seed=3), 1e-6
    with torch.no_grad():
        by_scale = float(end(scale + h, x) - end(scale - h, x)) / (2 * h)
        along_v = float(end(scale, x + h * v) - end(scale, x - h * v)) / (2 * h)
    assert float(parts[0]) == pytest.approx(by_scale, rel=1e-6)
    assert float((parts[1] * v).sum()) == pytest.approx(along_v, rel=1e-6)


# ---- the known problems


@pytest.mark.parametrize("name", [name for name in KNOWN if name != "noncommutative"])
def test_a_known_solution_solves_its_sde(name):
    """Ito's formula, by autograd: d_w u = g, and d_t u + 1/2 d_ww u the Ito drift."""
    known = KNOWN[name]
    x0 = known.x0(6)
    w, t = normals(*x0.shape).requires_grad_(), torch.tensor(0.4, **DOUBLE, requires_grad=True)
    x = known.solution(x0, t, w)
    (slope_w,) = torch.autograd.grad(x.sum(), w, create_graph=True)
    curve = torch.zeros_like(x)
    if slope_w.requires_grad:
        (found,) = torch.autograd.grad(slope_w.sum(), w, retain_graph=True, allow_unused=True)
        curve = curve if found is None else found
    slope_t = torch.autograd.functional.jvp(
        lambda u: known.solution(x0, u, w.detach()), t.detach(), torch.ones_like(t)
    )[1]
    with torch.no_grad():
        g = known.sde.diffusion(x, t).expand(x.shape)
        drift = known.sde.drift(x, t)
        if known.sde.calculus == "stratonovich":
            drift = drift + curve / 2  # g is linear in x there: (dg) g = d_ww u
        torch.testing.assert_close(slope_w, g, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(slope_t + curve / 2, drift, rtol=1e-12, atol=1e-12)


def test_the_known_solution_that_does_not_commute_solves_its_sde():
    """In Stratonovich's sense the chain rule is the ordinary one, with dA_21 = (w_2 o dw_1 -
    w_1 o dw_2)/2: d_1 u + w_2/2 d_A u = g_1, d_2 u - w_1/2 d_A u = g_2, d_t u = f."""
    known = KNOWN["noncommutative"]
    x0, w, a, t = known.x0(6), normals(6, 2), normals(6, seed=1), torch.tensor(0.4, **DOUBLE)

    def solution(t, w, a):
        none = torch.zeros_like(a)
        return known.solution(x0, t, w, torch.stack((none, -a, a, none), -1).reshape(6, 2, 2))

    def along(*v):
        return torch.autograd.functional.jvp(solution, (t, w, a), v)[1]

    x, still, none = solution(t, w, a), torch.zeros_like(w), torch.zeros_like(a)
    one = torch.tensor([1.0, 0.0], **DOUBLE).expand_as(w)
    first = along(0 * t, one, w[:, 1] / 2)
    second = along(0 * t, one.flip(1), -w[:, 0] / 2)
    g = known.sde.diffusion(x, t)
    torch.testing.assert_close(torch.stack((first, second), 2), g, rtol=1e-12, atol=1e-12)
    drift = along(torch.ones_like(t), still, none)
    torch.testing.assert_close(drift, known.sde.drift(x, t), rtol=1e-12, atol=1e-12)


def test_the_areas_of_the_exact_solution_converge_to_those_of_the_path():
    """On grids of 8, 16 and 32 steps of one path, the mean square distance to 2^-10 halves."""
    known, fine = KNOWN["noncommutative"], torch.linspace(0, 1, 1025, **DOUBLE)
    path = BrownianPath(4, (2000, 2), fine)
    exact = known.exact(path, fine)
    gaps = [
        float((known.exact(path, fine[:: 1024 // n]) - exact).square().sum(1).mean())
        for n in (8, 16, 32)
    ]
    assert [a / b for a, b in zip(gaps[:-1], gaps[1:], strict=True)] == pytest.approx(
        [2, 2], rel=0.15
    )


def test_the_new_solvers_are_found_by_name():
    for solver, name in zip(NEW, ("milstein", "euler_heun", "heun", "srk", "platen"), strict=True):
        assert get("solver", name) == solver
