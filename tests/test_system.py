"""`LinearSystem`: the kernel of coupled linear SDEs, component by component, against 60 digits.

Errors: of Phi and m relative to their largest entry, of P relative to sqrt(P_ii P_jj).
"""

import copy

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import label, numbers
from ztest import LIMIT, z_of_mean, z_of_variance

from sdeflow import (
    CLD,
    VP,
    ArgumentError,
    BrownianBridge,
    EulerMaruyama,
    GridError,
    Heun,
    LinearSystem,
    MatrixOU,
    PairingError,
    ShapeError,
    TorchDiffEq,
    TorchSDE,
    catalogue,
    get,
    integrate,
    probability_flow,
    reverse,
    sample,
)
from sdeflow.brownian import BrownianPath
from sdeflow.grid import quadratic, uniform
from sdeflow.testing.system import GaussianSystemData, system_law
from sdeflow.transitions import Transition

D = torch.float64
TIMES = [1e-8, 1e-5, 1e-3, 0.1, 1.0, 10.0]
ROWS, PUSH, KICK = [[0.0, 16.0], [-4.0, -16.0]], [0.3, -0.7], [[0.0], [2.0]]


def tensor(rows):
    return torch.tensor(rows, dtype=D)


def exact(F, G, c, t):
    """(Phi, m, P) by exponentials of block matrices (Van Loan, 1978) at 60 digits."""
    d = len(F)
    with mpmath.workdps(60):
        F, G, t = mpmath.matrix(F), mpmath.matrix(G), mpmath.mpf(t)
        block, affine = mpmath.zeros(2 * d), mpmath.zeros(d + 1)
        block[:d, :d], block[:d, d:], block[d:, d:] = -F, G * G.T, F.T
        affine[:d, :d], affine[:d, d:] = F, mpmath.matrix(c)
        whole = mpmath.expm(block * t)
        phi = whole[d:, d:].T
        return phi, mpmath.expm(affine * t)[:d, d:], phi * whole[:d, d:]


def worst_error(transition, F, G, c, t):
    """The largest error of a Transition, and whether its covariance has a Cholesky factor."""
    phi, m, p = exact(F, G, c, t)
    d = len(F)
    with mpmath.workdps(60):
        largest = max(map(abs, phi)), max([*map(abs, m), mpmath.mpf("1e-300")])
        errors = [abs(transition.offset[i].item() - m[i]) / largest[1] for i in range(d)]
        for i in range(d):
            for j in range(d):
                errors.append(abs(transition.matrix[i, j].item() - phi[i, j]) / largest[0])
                scale = mpmath.sqrt(p[i, i] * p[j, j])
                errors.append(abs(transition.covariance[i, j].item() - p[i, j]) / scale)
        return float(max(errors))


@pytest.mark.parametrize("t", TIMES)
def test_a_constant_system_is_exact_and_positive_definite(t):
    """Measured: 4e-15 in P; in Phi 3e-14 up to t = 1 and 3e-13 at t = 10, where it is 1e-33."""
    made = LinearSystem(ROWS, KICK, PUSH, T=10.0).transition(t)
    assert worst_error(made, ROWS, KICK, PUSH, t) < 1e-12
    assert t > 1 or worst_error(made, ROWS, KICK, PUSH, t) < 1e-13
    assert not torch.linalg.cholesky_ex(made.covariance).info


def test_the_accuracy_test_rejects_van_loan_alone():
    """The planted fault: one exponential of the block matrix, in float64."""
    F, G = tensor(ROWS), tensor(KICK)
    d, t = 2, 1e-3
    block = torch.zeros(2 * d, 2 * d, dtype=D)
    block[:d, :d], block[:d, d:], block[d:, d:] = F, G @ G.T, -F.T
    whole = torch.linalg.matrix_exp(block * t)
    covariance = whole[:d, d:] @ whole[:d, :d].T
    good = LinearSystem(ROWS, KICK, PUSH).transition(t)
    assert worst_error(good, ROWS, KICK, PUSH, t) < 1e-13
    bad = Transition(whole[:d, :d], good.offset, covariance)
    assert worst_error(bad, ROWS, KICK, PUSH, t) > 1e-11


entries = numbers(-2, 2).map(lambda v: round(v, 3))


@st.composite
def systems(draw):
    d, m = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    F = [[draw(entries) for _ in range(d)] for _ in range(d)]
    G = [[draw(entries) for _ in range(m)] for _ in range(d)]
    for i in range(d):  # the noise reaches every component, if but weakly
        G[i].append(draw(numbers(0.1, 1)))
    return F, G, [draw(entries) for _ in range(d)]


@settings(max_examples=40)
@given(system=systems(), t=numbers(-8, 1).map(lambda v: 10**v))
def test_random_systems_stable_or_not_are_exact(system, t):
    F, G, c = system
    made = LinearSystem(F, G, c, T=10.0).transition(t)
    # The last term is what a rounding of t does: nothing computes with less.
    assert worst_error(made, F, G, c, t) < 1e-13 + 1e-14 * t * sum(map(abs, sum(F, [])))


@settings(max_examples=6)
@given(system=systems(), u=numbers(-6, 0).map(lambda v: 10**v))
def test_a_system_given_by_functions_of_time_agrees(system, u):
    """Constant matrices as functions: panels against Taylor series and doubling."""
    F, G, c = map(tensor, system)
    panels = LinearSystem(lambda t: F, lambda t: G, lambda t: c, T=2.0)
    assert not panels.constant
    made = panels.transition(2 * u)
    assert worst_error(made, *system, 2 * u) < 1e-12


def swinging(t):
    """F(t) that does not commute with itself, yet is solved: a rotation seen from a turning frame.

    In Y = R(-w t) X, R a rotation by w t, dY = A Y dt + dw when dX = (w J + R A R^T) X dt + R dw.
    """
    R = turn(t)
    J = tensor([[0.0, -1.0], [1.0, 0.0]])
    return 3.0 * J + R @ tensor([[-1.0, 2.0], [0.0, -0.5]]) @ R.mT


def turn(t):
    angle = 3.0 * t
    rows = [[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


@pytest.mark.parametrize("t, s", [(1e-6, 0.0), (0.01, 0.0), (2.0, 0.0), (1.7, 0.4), (0.31, 0.3)])
def test_matrices_that_do_not_commute_are_integrated(t, s):
    kick = tensor([[1.0, 0.0], [0.3, 0.2]])
    sde = LinearSystem(swinging, lambda t: turn(t) @ kick, T=2.0)
    still = LinearSystem([[-1.0, 2.0], [0.0, -0.5]], kick, T=2.0).transition(t - s)
    R, S = turn(tensor(t)), turn(tensor(s))
    made = sde.transition(t, s)
    torch.testing.assert_close(made.matrix, R @ still.matrix @ S.T, rtol=0, atol=1e-12)
    want = R @ still.covariance @ R.T
    scale = (want.diagonal()[:, None] * want.diagonal()).sqrt()
    # (t - s itself is rounded, at 1e-16 of t)
    assert ((made.covariance - want) / scale).abs().max() < 1e-12


@pytest.mark.parametrize("t", [1e-8, 1e-3, 0.3, 1.7])
def test_a_clock_of_its_own_is_a_change_of_time(t):
    sde = LinearSystem(ROWS, KICK, PUSH, rate=lambda t: 1 + 3 * t**2, T=2.0)
    # Critical damping is a defective matrix: at t = 1.7, where Phi is 1e-21, a rounding of F
    # changes Phi by 1e-12 of itself.
    assert worst_error(sde.transition(t), ROWS, KICK, PUSH, t + t**3) < (1e-11 if t > 1 else 1e-13)
    F, G, c = map(tensor, (ROWS, KICK, PUSH))

    def b(t):
        return (1 + 3 * t**2)[..., None, None]

    written = LinearSystem(
        lambda t: b(t) * F, lambda t: b(t).sqrt() * G, lambda t: b(t)[..., 0] * c, T=2.0
    )
    assert worst_error(written.transition(t), ROWS, KICK, PUSH, t + t**3) < 1e-11


@pytest.mark.parametrize("functions", [False, True])
def test_transitions_compose_as_markov_kernels(functions):
    sde = LinearSystem(ROWS, KICK, PUSH, T=2.0)
    if functions:
        F, G, c = map(tensor, (ROWS, KICK, PUSH))
        sde = LinearSystem(lambda t: F, lambda t: G, lambda t: c, T=2.0)
    s, t = tensor([0.0, 0.3, 0.9]), tensor([0.5, 1.7, 0.9])
    first, second, whole = sde.transition(s), sde.transition(t, s), sde.transition(t)
    chain = second.matrix @ first.covariance @ second.matrix.mT + second.covariance
    torch.testing.assert_close(chain, whole.covariance, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(second.matrix @ first.matrix, whole.matrix, rtol=1e-9, atol=1e-13)


def test_gradients_reach_the_matrices_either_way():
    rate = tensor(1.5).requires_grad_()

    def theirs(F, t):
        return LinearSystem(F, [[1.0, 0.0], [0.0, 1.0]]).transition(t).covariance.sum()

    base = tensor([[-1.0, 0.4], [0.0, -2.0]])
    want = torch.autograd.grad(theirs(rate * base, 0.7), rate)[0]
    sde = LinearSystem(lambda t: rate * base, lambda t: torch.eye(2, dtype=D))
    made = torch.autograd.grad(sde.transition(0.7).covariance.sum(), rate)[0]
    torch.testing.assert_close(made, want, rtol=1e-10, atol=0)
    with torch.no_grad():
        rate.fill_(0.5)
        moved = sde.transition(0.7).covariance.sum()
    torch.testing.assert_close(moved, theirs(0.5 * base, 0.7), rtol=1e-12, atol=0)


# ---- the kernel in use


def test_the_start_of_a_velocity_is_in_the_kernel_and_not_in_the_transition():
    cld = CLD()
    phi, _, p = cld.transition(0.2)
    kernel = cld.kernel_at(0.2)
    torch.testing.assert_close(kernel.covariance, p + phi @ cld.start() @ phi.T)
    assert kernel.covariance[1, 1] > p[1, 1]
    still = cld.perturb(cld.lift(torch.ones(2, 3)), 0.0, torch.ones(2, 2, 3))
    torch.testing.assert_close(cld.data(still), torch.ones(2, 3))
    assert not torch.linalg.cholesky_ex(cld.kernel_at(1e-8).covariance).info


def test_the_critically_damped_system_ends_at_equilibrium():
    cld = CLD(T=10.0)
    matrix, _, covariance = cld.kernel_at(10.0)
    torch.testing.assert_close(covariance, torch.diag(tensor([1.0, 0.25])), rtol=1e-9, atol=1e-9)
    assert matrix.abs().max() < 1e-9


@pytest.mark.parametrize("rest", [(), (3,), (2, 3)])
def test_perturb_kernel_score_and_log_prob_are_one_law(rest):
    sde = MatrixOU(center=(0.5, -1.0))
    x0, noise = torch.randn(4, 2, *rest, dtype=D), torch.randn(4, 2, *rest, dtype=D)
    t = tensor([0.01, 0.3, 1.0, 4.0])
    x = sde.perturb(x0, t, noise).requires_grad_()
    log_p = sde.log_prob(x, x0, t)
    score = torch.autograd.grad(log_p.sum(), x)[0]
    torch.testing.assert_close(sde.kernel_score(x.detach(), x0, t), score)
    for b in range(4):
        law = sde.kernel_at(t[b])
        flat = x[b].detach().reshape(2, -1).T
        mean = x0[b].reshape(2, -1).T @ law.matrix.T + law.offset
        normal = torch.distributions.MultivariateNormal(mean, law.covariance)
        torch.testing.assert_close(log_p[b].detach(), normal.log_prob(flat).sum())


def test_the_log_density_of_a_singular_kernel_is_refused():
    sde = LinearSystem([[0.0, 0.0], [0.0, -1.0]], [[0.0], [1.0]])  # no noise reaches the first
    x = torch.zeros(1, 2, dtype=D)
    assert sde.perturb(x, 0.5, torch.ones_like(x))[0, 0] == 0
    with pytest.raises(ArgumentError, match="singular at t=0.5"):
        sde.log_prob(x, x, 0.5)


@pytest.mark.parametrize("sde", [CLD(), MatrixOU(T=1.0)], ids=repr)
def test_simulation_has_the_law_of_the_kernel(sde):
    """False-alarm rate: 6 tests at 5 standard errors, 1 in 300,000. Fresh paths, weak order 2."""
    start = torch.full((40_000, 2), 0.5)
    if sde.start() is not None:
        start[:, 1] = sde.start()[1, 1].sqrt() * torch.randn(40_000)
    x = integrate(sde, start, torch.linspace(0, 0.5, 101, dtype=D), Heun(), seed=1).x.double()
    x0 = tensor([0.5, 0.0 if sde.start() is not None else 0.5])
    matrix, offset, covariance = sde.kernel_at(0.5)
    mean = matrix @ x0 + offset
    for i in range(2):
        assert abs(z_of_mean(x[:, i], mean[i])) < LIMIT
        assert abs(z_of_variance(x[:, i], covariance[i, i])) < LIMIT
    far = MatrixOU(T=1.0).kernel_at(0.4).covariance[0, 0]  # the planted fault: another time's law
    assert abs(z_of_variance(x[:, 0], far)) > LIMIT


# ---- as an SDE, with every kind of solver


def test_the_full_matrix_of_an_image_state_is_what_spread_applies():
    sde, x, t = CLD(), torch.randn(3, 2, 2, 2, dtype=D), tensor(0.3)
    z = torch.randn(sde.noise_shape(x), dtype=D)
    assert z.shape == (3, 1, 2, 2)
    full = sde.diffusion(x, t)
    assert full.shape == (3, 2, 2, 2, 4)
    torch.testing.assert_close(
        sde.spread(x, t, z), torch.einsum("bipqm,bm->bipq", full, z.flatten(1))
    )
    gram = torch.einsum("bipqm,bjrsm,bjrs->bipq", full, full, x)
    torch.testing.assert_close(sde.covariance_product(x, t, x), gram)
    assert (sde.divergence(x, t) == 0).all()
    each = sde.diffusion(x, tensor([0.1, 0.2, 0.3]))
    assert each.shape == full.shape


def test_a_time_for_each_sample_gives_what_each_alone_gives():
    sde = LinearSystem(swinging, lambda t: turn(t), lambda t: torch.stack((t, 1 - t), -1), T=2.0)
    x, t = torch.randn(3, 2, 5, dtype=D), tensor([0.1, 0.7, 1.9])
    for what in (sde.drift(x, t), sde.spread(x, t, x), sde.perturb(x, t, x)):
        assert what.shape == x.shape
    for b in range(3):
        one, u = x[b : b + 1], t[b]
        torch.testing.assert_close(sde.drift(x, t)[b : b + 1], sde.drift(one, u))
        torch.testing.assert_close(sde.spread(x, t, x)[b : b + 1], sde.spread(one, u, one))
        torch.testing.assert_close(sde.perturb(x, t, x)[b : b + 1], sde.perturb(one, u, one))


RUNS = [EulerMaruyama(), Heun(), TorchSDE("euler"), TorchSDE("heun"), TorchDiffEq("rk4")]


@pytest.mark.parametrize("solver", RUNS, ids=repr)
@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 4)])
def test_generic_solvers_run_forward_and_in_reverse(solver, shape):
    cld, x = CLD(), torch.randn(shape, dtype=D)
    data = GaussianSystemData(cld, tensor([0.5, 0.0]), torch.diag(tensor([0.3, 0.0])))
    up, down = torch.linspace(0, 1, 9, dtype=D), torch.linspace(1, 0.1, 9, dtype=D)
    if isinstance(solver, TorchDiffEq):
        assert integrate(probability_flow(cld, data), x, down, solver).x.shape == shape
        return
    assert integrate(cld, x, up, solver, seed=0).x.shape == shape
    made = integrate(reverse(cld, data), x, down, solver, seed=0).x
    assert made.shape == shape
    if "euler" in repr(solver).lower():  # one method, two roads
        torch.testing.assert_close(
            made, integrate(reverse(cld, data), x, down, EulerMaruyama(), seed=0).x
        )


@pytest.mark.parametrize("sde", [CLD(), MatrixOU()], ids=repr)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_the_reverse_returns_the_law_it_came_from(sde, eta):
    """Exactly, by propagation: the error of Heun's method falls with its order, to the target."""
    start = sde.start()
    data = GaussianSystemData(
        sde, tensor([0.5, 0.0]), torch.diag(tensor([0.5, 0.4 if start is None else 0.0]))
    )
    process, errors = reverse(sde, data, eta), []
    for n in (40, 160):
        ts = uniform(sde, n, t_max=1.0, t_min=0.1)
        mean, covariance = system_law(process, ts, Heun(), *data.law(ts[0]))
        want = data.law(ts[-1])
        errors.append(max((mean - want[0]).abs().max(), (covariance - want[1]).abs().max()))
    assert errors[1] < 1e-3 and errors[0] / errors[1] > 8


def test_half_the_noise_is_not_the_law():
    """The planted fault: eta taken for its half in the drift alone."""
    sde = MatrixOU()
    data = GaussianSystemData(sde, tensor([0.5, 0.0]), torch.eye(2, dtype=D))

    class Halved(type(reverse(sde, data))):
        def spread(self, x, t, z):
            return super().spread(x, t, z) / 2

    ts = uniform(sde, 160, t_max=1.0, t_min=0.1)
    _, made = system_law(Halved(sde, data), ts, Heun(), *data.law(ts[0]))
    assert (made - data.law(ts[-1])[1]).abs().max() > 0.05


def test_sampling_begins_at_the_prior_of_the_system():
    cld = CLD()
    data = GaussianSystemData(cld, tensor([0.5, 0.0]), torch.diag(tensor([0.3, 0.0])))
    process = reverse(cld, data)
    run = sample(process, (4000, 2), solver="euler_maruyama", grid="quadratic", steps=300, seed=0)
    assert abs(float(cld.data(run.x).var()) - 0.3) < 0.1
    assert run.x.dtype == torch.float32
    with pytest.raises(GridError, match="use the grid 'uniform'"):
        sample(process, (4, 2), solver="euler_maruyama")
    with pytest.raises(PairingError, match="GDDIM"):
        sample(process, (4, 2), solver="ddim", grid="uniform")


def test_a_brownian_path_drives_a_system_at_any_step():
    sde, ts = MatrixOU(T=1.0), torch.linspace(0, 1, 257, dtype=D)
    x = torch.zeros(8, 2, dtype=D)
    path = BrownianPath(3, tuple(sde.noise_shape(x)), ts, dtype=D)
    fine, coarse, rough = (
        integrate(sde, x, ts[::k], EulerMaruyama(), noise=path).x for k in (1, 4, 32)
    )
    assert (fine - coarse).abs().max() < (fine - rough).abs().max() < 0.5


# ---- the catalogue, values and refusals


def test_the_catalogue_has_them():
    assert isinstance(get("sde", "cld", beta=2.0), CLD)
    assert {"matrix_ou", "cld", "brownian_bridge"} <= catalogue("sde").keys()
    assert get("sde", "matrix_ou") == MatrixOU() and repr(MatrixOU()).startswith("MatrixOU(theta=")
    sde = copy.deepcopy(LinearSystem(ROWS, KICK))
    assert sde.transition(0.3).matrix.shape == (2, 2)


def test_a_stationary_ornstein_uhlenbeck_process_solves_lyapunovs_equation():
    sde = MatrixOU(T=60.0)
    covariance, F = sde.transition(60.0).covariance, sde.F(tensor(0.0))
    G = sde.G(tensor(0.0))
    torch.testing.assert_close(F @ covariance + covariance @ F.T, -G @ G.T, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: LinearSystem([[1.0]], [[1.0], [2.0]]), ShapeError, "with one d"),
        (lambda: LinearSystem([1.0], [[1.0]]), ShapeError, "must be a matrix"),
        (lambda: LinearSystem([[1.0]], [[1.0]], T=0.0), ArgumentError, "T=0.0"),
        (lambda: CLD(mass=-1.0), ArgumentError, "mass=-1.0"),
        (lambda: CLD(T=-1.0), ArgumentError, "T=-1.0"),
        (lambda: CLD().transition(0.1, 0.2), ArgumentError, "0 <= s <= t"),
        (lambda: CLD().drift(torch.zeros(3, 4), tensor(0.1)), ShapeError, "takes .B, 2, *"),
        (lambda: CLD().perturb(torch.zeros(1, 2), 0.1, torch.zeros(2)), ShapeError, "noise has"),
        (lambda: LinearSystem([[float("nan")]], [[1.0]]).transition(1.0), ArgumentError, "finite"),
    ],
    ids=label,
)
def test_what_makes_no_system_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


# ---- the Brownian bridge


def test_the_bridge_is_bound_at_both_ends():
    bridge, x0 = BrownianBridge(end=2.0, volatility=0.7, T=3.0), torch.full((4, 2), -1.0)
    mean, variance = bridge.moments(x0, 3.0)
    assert (mean == 2).all() and variance == 0
    mean, variance = bridge.moments(x0, 0.0)
    assert (mean == -1).all() and variance == 0
    half = bridge.moments(x0, 1.5)
    assert (half[0] == 0.5).all() and float(half[1]) == pytest.approx(0.49 * 0.75)


def test_the_bridge_is_simulated_up_to_its_end():
    """False-alarm rate: 2 tests at 5 standard errors, 1 in 900,000."""
    bridge, x0 = BrownianBridge(end=1.0, T=2.0), torch.zeros(40_000, dtype=D)
    ts = torch.linspace(0, 2, 257, dtype=D)
    path = integrate(bridge, x0, ts, EulerMaruyama(), seed=0, keep=True).path
    assert (path[-1] - 1).abs().max() < 6 * (2 / 256) ** 0.5
    mean, variance = bridge.moments(x0, ts[128])
    assert abs(z_of_mean(path[128], mean[0])) < LIMIT
    assert abs(z_of_variance(path[128], variance)) < LIMIT
    assert abs(z_of_variance(path[128], 1.1 * variance)) > LIMIT  # the planted fault


def test_the_kernel_of_the_bridge_obeys_its_own_coefficients():
    """d mean/dt = drift at the mean, d variance/dt = 2 f variance + g^2."""
    bridge, x0 = BrownianBridge(end=1.5, volatility=0.8), torch.zeros(1, 1, dtype=D)
    t = tensor(0.37).requires_grad_()
    mean, variance = bridge.moments(x0, t)
    slopes = [torch.autograd.grad(v.sum(), t, retain_graph=True)[0] for v in (mean, variance)]
    torch.testing.assert_close(slopes[0], bridge.drift(mean, t).sum())
    torch.testing.assert_close(slopes[1], -2 * variance / (1 - t) + 0.8**2)


def test_vp_as_a_system_of_one_is_vp():
    vp = VP()
    sde = LinearSystem([[-0.5]], [[1.0]], rate=lambda t: 2 * -vp.rates(t)[0])
    t = tensor([1e-5, 0.3, 1.0])
    law = sde.kernel_at(t)
    torch.testing.assert_close(law.matrix[:, 0, 0], vp.alpha(t), rtol=1e-13, atol=0)
    torch.testing.assert_close(law.covariance[:, 0, 0], vp.sigma(t) ** 2, rtol=1e-13, atol=0)
    assert quadratic(sde, 5)[-1] == sde.t_min
