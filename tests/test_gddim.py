"""Generalised DDIM: exact on one-point data, of its order on Gaussian data, DDIM for one component.

Errors are exact, by propagation: of the output's mean, and of its covariance relative to
sqrt(C_ii C_jj) of the true one.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import numbers
from sdeflow_plugins.solvers.ddim import DDIM
from sdeflow_plugins.solvers.dpmpp import DPMpp1S
from sdeflow_plugins.solvers.gddim import GDDIM, GDDIM2M, tables

from sdeflow import (
    CLD,
    VP,
    ArgumentError,
    GridError,
    LinearSystem,
    MatrixOU,
    PairingError,
    catalogue,
    encode,
    get,
    integrate,
    probability_flow,
    reverse,
    sample,
)
from sdeflow.brownian import BrownianPath
from sdeflow.grid import quadratic, uniform
from sdeflow.testing import GaussianData, order
from sdeflow.testing.system import GaussianSystemData, system_law

D = torch.float64
ETAS = pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
SOLVERS = pytest.mark.parametrize("solver", [GDDIM(), GDDIM2M()], ids=repr)


def tensor(rows):
    return torch.tensor(rows, dtype=D)


class Turning(LinearSystem):
    """Three components, matrices that do not commute, two noises and an offset."""

    T = 2.0

    def __init__(self):
        self.__post_init__()

    def F(self, t):
        F = tensor([[-1.0, 2.0, 0.0], [-2.0, -0.5, 0.3], [0.0, 0.7, -1.0]])
        return F + t[..., None, None] * tensor([[0.0, 1, 0], [0, 0, 1], [-1, 0, 0]])

    def G(self, t):
        return (1 + t)[..., None, None] * tensor([[0.5, 0.0], [0.2, 1.0], [0.0, 0.4]])

    def c(self, t):
        return torch.stack((t, 1 - t, 0.5 * t), -1)


SYSTEMS = [CLD(), MatrixOU(center=(0.3, -1.0)), Turning()]
EACH = pytest.mark.parametrize("sde", SYSTEMS, ids=lambda sde: type(sde).__name__)


def data(sde, variance):
    """N(mean, variance) in the first component; the rest of the data, too, where it is no start."""
    d = sde.F(tensor(0.0)).shape[-1]
    spread = torch.eye(d, dtype=D) * variance
    if sde.start() is not None:
        spread[1, 1] = 0
    mean = torch.linspace(0.7, 0.0, d, dtype=D)
    return GaussianSystemData(sde, mean, spread)


def error(solver, sde, eta, ts, variance):
    target = data(sde, variance)
    made = system_law(reverse(sde, target, eta), ts, solver, *target.law(ts[0]))
    mean, covariance = target.law(ts[-1])
    std = covariance.diagonal().sqrt()
    off = (made[1] - covariance) / (std * std[:, None])
    return float(max(((made[0] - mean) / std).abs().max(), off.abs().max()))


@EACH
@ETAS
@SOLVERS
def test_one_point_data_are_exact_on_any_grid(sde, eta, solver):
    """Measured: 2e-11 at the most (the data are e^-8 of the state at T), 1e-13 as a rule."""
    for times in ([1.0, 0.02], [1.0, 0.9, 0.3, 0.25, 0.01]):
        assert error(solver, sde, eta, tensor(times) * sde.T, 0.0) < 1e-10


def gentle(sde, n):
    return uniform(sde, n, t_max=sde.T / 2, t_min=sde.T / 10)


# The orders of solvers on systems (of all others: test_certified.py), on data of variance 0.5.
ORDERS = {
    # solver: (order on the probability flow, weak order at eta = 0.5 and 1)
    "gddim": (1, 1),
    "gddim_2m": (2, 2),
}


def test_every_solver_for_systems_has_its_order_measured():
    own = {name for name in catalogue("solver") if "system" in get("solver", name).needs}
    assert own == ORDERS.keys()
    for name, declared in ORDERS.items():
        assert (get("solver", name).order, get("solver", name).weak_order) == declared


def measured(solver, sde, eta):
    steps = [40, 80] if isinstance(sde, Turning) else [80, 160]
    return order([error(solver, sde, eta, gentle(sde, n), 0.5) for n in steps], steps)


@EACH
@ETAS
@pytest.mark.parametrize("name", ORDERS)
def test_the_order_on_gaussian_data_is_the_declared(name, sde, eta):
    assert measured(get("solver", name), sde, eta) == pytest.approx(ORDERS[name][eta > 0], abs=0.1)


class Frozen(GDDIM2M):
    """The planted fault: the change of the predicted data at half its size."""

    def correction(self, law, mean, t, memory):
        return super().correction(law, mean, t, memory) / 2


def test_half_an_extrapolation_is_found():
    assert measured(Frozen(), CLD(), 0.0) == pytest.approx(1, abs=0.1)
    assert error(Frozen(), CLD(), 0.0, gentle(CLD(), 20), 0.0) < 1e-10  # one-point data do not see


@ETAS
def test_the_flow_of_r_is_the_rotation_of_its_equation(eta):
    """R R^T = P at eta = 0, P - Psi P Psi^T the added noise otherwise; at eta = 1 Psi is the gain
    of the Gaussian posterior, P_s Phi^T P_t^{-1}."""
    for sde in SYSTEMS:
        ts = tensor([0.9, 0.5, 0.02]) * sde.T
        table = tables(reverse(sde, data(sde, 0.0), eta), ts)
        for k in range(2):
            law_t, law_s = sde.kernel_at(ts[k]), sde.kernel_at(ts[k + 1])
            psi = table["turn"][k]
            added = table["spread"][k] @ table["spread"][k].mT
            made = psi @ law_t.covariance @ psi.mT + added
            torch.testing.assert_close(made, law_s.covariance, rtol=1e-10, atol=1e-12)
            assert (added == 0).all() == (eta == 0)
            if eta == 1:
                phi = sde.transition(ts[k], ts[k + 1]).matrix
                gain = law_s.covariance @ phi.mT @ torch.linalg.inv(law_t.covariance)
                torch.testing.assert_close(psi, gain, rtol=1e-9, atol=1e-11)


def test_the_flow_of_r_solves_its_equation_step_by_step():
    """Against 4,000 steps of the classical Runge-Kutta method on dR/dt = (F + G G^T P^{-1}/2) R."""
    cld = CLD()

    def slope(R, t):
        G = cld.G(t)
        return (cld.F(t) + G @ G.T @ torch.linalg.inv(cld.kernel_at(t).covariance) / 2) @ R

    ts, R = torch.linspace(1.0, 0.5, 401, dtype=D), torch.eye(2, dtype=D)
    for t, s in zip(ts[:-1], ts[1:], strict=True):
        h = s - t
        a = slope(R, t)
        b = slope(R + h / 2 * a, t + h / 2)
        c = slope(R + h / 2 * b, t + h / 2)
        R = R + h / 6 * (a + 2 * b + 2 * c + slope(R + h * c, s))
    table = tables(probability_flow(cld, data(cld, 0.0)), tensor([1.0, 0.5]))
    torch.testing.assert_close(table["turn"][0], R, rtol=0, atol=1e-8)


@ETAS
def test_for_one_component_it_is_dpm_solver_1s_and_so_ddim(eta):
    vp = VP()
    sde = LinearSystem([[-0.5]], [[1.0]], rate=lambda t: -2 * vp.rates(t)[0])
    mean, variance = tensor([0.4]), tensor([0.3])
    ts, x = tensor([0.8, 0.5, 0.1, 0.0]), torch.randn(5, 1, dtype=D)
    score = GaussianSystemData(sde, mean, variance[:, None])
    ours = integrate(reverse(sde, score, eta), x, ts, GDDIM(), seed=1)
    for solver in (DPMpp1S(), DDIM()) if eta != 0.5 else (DPMpp1S(),):
        data = GaussianData(vp, mean, variance)
        theirs = integrate(reverse(vp, data, eta), x, ts, solver, seed=1)
        torch.testing.assert_close(ours.x, theirs.x, rtol=1e-10, atol=1e-12)
        assert ours.nfe == theirs.nfe == 3


@settings(max_examples=8)
@given(
    beta=numbers(1, 4),
    mass=numbers(0.2, 1),
    damping=numbers(0.5, 1.2),
    gamma=numbers(0.01, 1),
    eta=st.sampled_from((0.0, 0.3, 1.0)),
    cuts=st.lists(numbers(0.02, 0.98), min_size=1, max_size=4, unique=True),
)
def test_any_damping_is_exact_on_one_point_data(beta, mass, damping, gamma, eta, cuts):
    """To 1e-8: over the whole way a rounding error of x_T counts up to 1/Phi, some 10^4."""
    cld = CLD(beta, mass, damping * 2 * mass**0.5, gamma)
    ts = tensor(sorted({1.0, 0.01, *(round(c, 3) for c in cuts)}, reverse=True))
    assert error(GDDIM2M(), cld, eta, ts, 0.0) < 1e-8


@SOLVERS
def test_a_step_to_zero_returns_the_predicted_data(solver):
    cld = CLD()
    target = data(cld, 0.0)
    x = integrate(reverse(cld, target), torch.randn(3, 2, dtype=D), tensor([1, 0.5, 0]), solver).x
    torch.testing.assert_close(x, target.mean.expand(3, 2), rtol=0, atol=1e-10)


@ETAS
@SOLVERS
def test_images_run_as_their_pixels_do(solver, eta):
    cld, x = CLD(), torch.randn(3, 2, 2, 4)
    process = reverse(cld, data(cld, 0.3), eta)
    ts = quadratic(cld, 6)
    path = BrownianPath(0, tuple(process.noise_shape(x)), tensor(halves(ts)))
    z = {}

    def noise(t, s):
        return z.setdefault((float(t), float(s)), path(t, s))

    whole = integrate(process, x, ts, solver, noise=noise).x
    pixel = integrate(
        process, x[:, :, 1, 2], ts, solver, noise=lambda t, s: z[float(t), float(s)][:, :, 1, 2]
    )
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole[:, :, 1, 2], pixel.x, rtol=1e-4, atol=1e-5)


def halves(ts):
    """The grid with the middles of its steps, where one noise does for two components."""
    middle = torch.lerp(ts[:-1], ts[1:], tensor(0.5))
    return torch.cat((ts, middle)).unique().tolist()


def test_sampling_by_name_and_encoding_back():
    cld = CLD()
    flow = probability_flow(cld, data(cld, 0.3))
    run = sample(flow, (64, 2), solver="gddim_2m", grid="quadratic", steps=60, seed=0, dtype=D)
    back = encode(flow, run.x, solver="gddim_2m", grid="quadratic", steps=60).x
    first = cld.prior(torch.zeros(64, 2, dtype=D))
    assert back.shape == first.shape and run.nfe == 60 and not run.fused
    again = integrate(flow, back, quadratic(cld, 60), GDDIM2M()).x
    assert (again - run.x).abs().max() < 0.3
    assert math.isclose(float(run.x[:, 0].mean()), 0.7, abs_tol=0.3)


def test_wrong_pairings_are_refused_with_a_remedy():
    vp = VP()
    x, ts = torch.zeros(2, 2), tensor([0.9, 0.1])
    flow = probability_flow(vp, GaussianData(vp, tensor([0.0]), tensor([1.0])))
    with pytest.raises(PairingError, match="LinearSystem.*use DDIM"):
        integrate(flow, x, ts, GDDIM())
    cld = probability_flow(CLD(), data(CLD(), 0.0))
    with pytest.raises(GridError, match="singular"):
        integrate(cld, x, tensor([0.0, 0.5]), GDDIM())
    silent = LinearSystem([[0.0, 0.0], [0.0, -1.0]], [[0.0], [1.0]])
    with pytest.raises(ArgumentError, match="singular"):
        integrate(probability_flow(silent, lambda x, t: x), x, ts, GDDIM())
