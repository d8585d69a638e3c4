"""The generic solvers: Euler-Maruyama and Heun, on any process, by drift and diffusion alone.
(tests/test_sde_solvers.py has those for noise that depends on the state.)"""

import math

import pytest
import torch
from problems import BrownianPath
from ztest import LIMIT, z_of_mean

from sdeflow import GBM, OU, SDE, VP, EulerMaruyama, Heun, integrate, probability_flow, reverse
from sdeflow.grid import log_snr

DOUBLE = {"dtype": torch.float64}
UNEVEN = torch.tensor([0.0, 0.1, 0.15, 0.4, 1.0], **DOUBLE)


def slope(errors, steps):
    return math.log(errors[0] / errors[-1]) / math.log(steps[-1] / steps[0])


def strong_slope(sde, solver, exact, steps, x0, paths=4000, **options):
    """The order of E|x_N - x(w)| over runs that share their Brownian paths."""
    path = BrownianPath((paths, 1), steps[-1])
    start = torch.full((paths, 1), x0, **DOUBLE)
    errors = []
    for n in steps:
        ts = torch.linspace(0, 1, n + 1, **DOUBLE)
        end = integrate(sde, start, ts, solver, noise=path.noise(n), **options).x
        errors.append(float((end - exact(path.end)).abs().mean()))
    return slope(errors, steps)


class Rotation(SDE):
    """Two components driven by one Wiener process, through a matrix that looks at the state."""

    noise = "matrix"

    def drift(self, x, t):
        return torch.stack((-x[:, 1], x[:, 0]), 1)

    def diffusion(self, x, t):
        return torch.stack((x[:, :1], 1 + 0 * x[:, :1]), 1) * (1 + t)


# ---- Euler-Maruyama


def test_euler_maruyama_is_its_formula_forward():
    x = torch.randn(4, 3, **DOUBLE)
    z = torch.randn(4, 4, 3, **DOUBLE)
    draws = iter(z)
    path = integrate(
        GBM(0.3, 0.7), x, UNEVEN, EulerMaruyama(), noise=lambda t, s: next(draws), keep=True
    ).path
    for k in range(4):
        h = UNEVEN[k + 1] - UNEVEN[k]
        x = x + 0.3 * x * h + 0.7 * x * h.sqrt() * z[k]
        torch.testing.assert_close(path[k + 1], x, rtol=1e-12, atol=1e-12)


def test_euler_maruyama_is_its_formula_in_reverse():
    """x_s = x - [f - g^2 score] |h| + g sqrt(|h|) z: the bracket is subtracted."""
    sde, x, z = VP(), torch.randn(4, 3, **DOUBLE), torch.randn(4, 3, **DOUBLE)
    t, s = torch.tensor([0.6, 0.5], **DOUBLE)
    beta = 0.1 + 19.9 * 0.6
    h = 0.1
    expected = x - (-beta / 2 * x + beta * x) * h + math.sqrt(beta * h) * z
    process = reverse(sde, lambda x, t: -x)
    made = integrate(process, x, torch.stack((t, s)), EulerMaruyama(), noise=lambda t, s: z).x
    torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)


def test_euler_maruyama_on_an_ode_is_euler_s_method_and_draws_nothing():
    def silent(t, s):
        raise AssertionError("noise was drawn")

    flow, x = probability_flow(VP(), lambda x, t: -2 * x), torch.randn(4, 3, **DOUBLE)
    ts = torch.tensor([0.6, 0.5], **DOUBLE)
    beta = 0.1 + 19.9 * 0.6
    made = integrate(flow, x, ts, EulerMaruyama(), noise=silent).x
    torch.testing.assert_close(made, x - 0.1 * (-beta / 2 * x + beta * x), rtol=1e-12, atol=0)


def test_euler_maruyama_takes_matrix_noise():
    x, z = torch.randn(4, 2, **DOUBLE), torch.randn(4, 4, 1, **DOUBLE)
    draws = iter(z)
    made = integrate(Rotation(), x, UNEVEN, EulerMaruyama(), noise=lambda t, s: next(draws)).x
    for k in range(4):
        t, h = UNEVEN[k], UNEVEN[k + 1] - UNEVEN[k]
        g = torch.stack((x[:, 0], torch.ones(4, **DOUBLE)), 1) * (1 + t)
        x = x + h * torch.stack((-x[:, 1], x[:, 0]), 1) + h.sqrt() * g * z[k]
    torch.testing.assert_close(made, x, rtol=1e-12, atol=1e-12)


def test_matrix_noise_from_a_seed_has_one_normal_a_wiener_process():
    seeded = integrate(Rotation(), torch.ones(64, 2), UNEVEN, EulerMaruyama(), seed=1)
    few = integrate(Rotation(), torch.ones(8, 2), UNEVEN, EulerMaruyama(), seed=1)
    assert torch.equal(seeded.x[:8], few.x)


def test_euler_maruyama_has_strong_order_one_half_on_gbm():
    sde = GBM(0.3, 0.7)
    order = strong_slope(
        sde, EulerMaruyama(), lambda w: torch.exp(0.3 - 0.245 + 0.7 * w), [8, 16, 32, 64], 1.0
    )
    assert order == pytest.approx(0.5, abs=0.1)


def test_euler_maruyama_has_strong_order_one_on_additive_noise():
    """Against a run 64 times finer on the same path."""
    sde, fine = OU(theta=1.0, volatility=1.0), 4096
    path = BrownianPath((500, 1), fine)
    start = torch.ones(500, 1, **DOUBLE)

    def run(n):
        ts = torch.linspace(0, 1, n + 1, **DOUBLE)
        return integrate(sde, start, ts, EulerMaruyama(), noise=path.noise(n)).x

    exact, steps = run(fine), [8, 16, 32, 64]
    errors = [float((run(n) - exact).abs().mean()) for n in steps]
    assert slope(errors, steps) == pytest.approx(1.0, abs=0.1)


def test_euler_maruyama_converges_to_the_ito_solution():
    """E x_1 = e^mu in Ito's sense, e^(mu + volatility^2/2) in Stratonovich's. |z| < 5: a false
    alarm once in 1.7 million runs."""
    sde, ts = GBM(0.0, 0.5), torch.linspace(0, 1, 101, **DOUBLE)
    x = integrate(sde, torch.ones(20_000, 1, **DOUBLE), ts, EulerMaruyama(), seed=1).x
    assert abs(z_of_mean(x, 1.0)) < LIMIT
    assert abs(z_of_mean(x, math.exp(0.125))) > LIMIT


# ---- Heun


def test_heun_is_the_trapezoid_rule_on_an_ode():
    flow, x = probability_flow(VP(), lambda x, t: -2 * x), torch.randn(4, 3, **DOUBLE)
    ts = torch.tensor([0.6, 0.5], **DOUBLE)
    before, after = ((0.1 + 19.9 * t) / 2 for t in (0.6, 0.5))  # dx/dt = beta/2 x
    u = x - 0.1 * before * x
    made = integrate(flow, x, ts, Heun()).x
    torch.testing.assert_close(made, x - 0.05 * (before * x + after * u), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("solver", "order"), [(EulerMaruyama(), 1), (Heun(), 2)], ids=repr)
def test_the_weak_order_forward_is_the_declared(solver, order):
    """On Ornstein-Uhlenbeck, exactly: x_1 = a x_0 + sum_j c_j z_j, read off on unit vectors."""
    sde = OU(theta=2.0, volatility=1.5)
    errors = []
    for n in (40, 80):
        unit = torch.eye(n + 1, **DOUBLE)
        ts = torch.linspace(0, 1, n + 1, **DOUBLE)
        columns = (unit[:, [k]] for k in range(1, n + 1))
        end = integrate(sde, unit[:, :1], ts, solver, noise=lambda t, s, z=columns: next(z)).x
        a, c = end[0, 0], end[1:, 0]
        made = a**2 * 0.3 + (c**2).sum()
        one = torch.ones((), **DOUBLE)
        errors.append(abs(float(made - sde.alpha(one) ** 2 * 0.3 - sde.sigma(one) ** 2)))
    assert slope(errors, [40, 80]) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("solver", [EulerMaruyama(), Heun()], ids=repr)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (2, 3, 4)])
def test_states_of_any_rank_are_their_components(solver, shape):
    """On independent components a state of any shape is its flattened one."""
    process, ts = reverse(VP(), lambda x, t: -torch.tanh(x)), log_snr(VP(), 6)
    x = torch.randn(4, *shape, **DOUBLE)
    many = integrate(process, x, ts, solver, seed=1).x
    flat = integrate(process, x.reshape(4, -1), ts, solver, seed=1).x
    torch.testing.assert_close(many, flat.reshape(x.shape), rtol=1e-13, atol=0)
