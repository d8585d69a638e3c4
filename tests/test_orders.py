"""Measured orders: within 0.05 of what each registered solver declares, in float64.

On the probability flow against a fine reference on a Gaussian mixture; on SDEs by the exact
relative error of the output variance on Gaussian data. Steps are where the asymptotic order shows.
"""

import functools

import pytest
from sdeflow_plugins.dpmpp import DPMpp2M

from sdeflow import VP, EulerMaruyama, catalogue, get
from sdeflow.backends import ODE_METHODS
from sdeflow.grid import log_snr, uniform
from sdeflow.testing import order, strong_errors, weak_errors

ENDS = {"t_max": 0.6, "t_min": 0.02}
EVEN, IN_T = functools.partial(log_snr, **ENDS), functools.partial(uniform, **ENDS)

ODE = {
    # solver                        grid, steps
    "euler_maruyama": (EVEN, [160, 320]),
    "heun": (EVEN, [160, 320]),
    "ddim": (EVEN, [160, 320]),
    "dpmpp_1s": (EVEN, [160, 320]),
    "dpmpp_2s": (EVEN, [160, 320]),
    "dpmpp_2m": (EVEN, [160, 320]),
    "torchdiffeq_euler": (EVEN, [160, 320]),
    "torchdiffeq_midpoint": (EVEN, [160, 320]),
    "torchdiffeq_heun2": (EVEN, [160, 320]),
    "torchdiffeq_heun3": (EVEN, [160, 320]),
    "torchdiffeq_rk4": (EVEN, [80, 160]),
    "torchdiffeq_explicit_adams": (IN_T, [320, 640]),
    "torchdiffeq_implicit_adams": (IN_T, [160, 320]),
}
SDE = {
    # solver                     steps
    "euler_maruyama": [160, 320],
    "heun": [160, 320],
    "ddpm": [160, 320],
    "ddim": [160, 320],
    "dpmpp_1s": [160, 320],
    "dpmpp_2s": [160, 320],
    "dpmpp_2m": [160, 320],
    "torchsde": [160, 320],
    "torchsde_euler": [160, 320],
    "torchsde_milstein": [160, 320],
    "torchsde_srk": [160, 320],
    "torchsde_euler_heun": [320, 640],
    "torchsde_heun": [160, 320],
    "torchsde_midpoint": [160, 320],
    "torchsde_log_ode": [160, 320],
    "torchsde_reversible_heun": [160, 320],
}
ADAPTIVE = {"torchdiffeq"} | {f"torchdiffeq_{m}" for m, (_, n) in ODE_METHODS.items() if n is None}


def measured(solver):
    grid, steps = ODE[solver] if isinstance(solver, str) else (EVEN, [160, 320])
    return order(strong_errors(solver, VP(), steps, grid), steps)


def weakly_measured(solver, eta=1.0, steps=(160, 320)):
    return order(weak_errors(solver, VP(), eta, list(steps), EVEN), list(steps))


def test_every_registered_solver_has_its_order_measured():
    own = [name for name, entry in catalogue("solver").items() if entry.distribution == "sdeflow"]
    assert set(own) == ODE.keys() | SDE.keys() | ADAPTIVE
    for name in own:
        assert (get("solver", name).order is not None) == (name in ODE.keys() | ADAPTIVE)
        assert (get("solver", name).weak_order is not None) == (name in SDE)


@pytest.mark.parametrize("name", ODE)
def test_the_order_on_the_probability_flow_is_the_declared(name):
    assert measured(name) == pytest.approx(get("solver", name).order, abs=0.05)


@pytest.mark.parametrize("name", SDE)
def test_the_weak_order_on_the_reverse_sde_is_the_declared(name):
    declared = get("solver", name).weak_order
    assert weakly_measured(name, steps=SDE[name]) == pytest.approx(declared, abs=0.05)


@pytest.mark.parametrize("name", [name for name in SDE if name != "ddpm" and name in ODE])
def test_the_weak_order_is_the_same_at_any_eta(name):
    assert weakly_measured(name, eta=0.5) == pytest.approx(get("solver", name).weak_order, abs=0.05)


def test_the_large_variance_of_ddpm_has_the_order_of_the_small():
    ddpm = get("solver", "ddpm", variance="large")
    assert weakly_measured(ddpm) == pytest.approx(1, abs=0.05)


def test_the_two_variances_of_ddpm_enclose_the_truth():
    """Errors of opposite signs on Gaussian data: the best fixed variance lies between."""
    small, large = (
        weak_errors(get("solver", "ddpm", variance=name), VP(), 1.0, [80])[0]
        for name in ("small", "large")
    )
    assert small < 0 < large


@pytest.mark.parametrize("name", sorted(ADAPTIVE))
def test_an_adaptive_method_follows_its_tolerance(name):
    loose, tight = (
        strong_errors(get("solver", name, rtol=tolerance, atol=tolerance), VP(), [10], EVEN)[0]
        for tolerance in (1e-3, 1e-6)
    )
    assert tight < 100 * 1e-6
    assert tight < loose / 100


class SoldAsSecond(EulerMaruyama):
    order = weak_order = 2


class HalvedExtrapolation(DPMpp2M):
    def step(self, process, x, t, s, noise, memory):
        if memory is not None:
            memory = (memory[0], 2 * memory[1])
        return super().step(process, x, t, s, noise, memory)


@pytest.mark.parametrize("solver", [SoldAsSecond(), HalvedExtrapolation()], ids=repr)
def test_a_first_order_solver_sold_as_second_is_found(solver):
    assert solver.order == solver.weak_order == 2
    assert measured(solver) == pytest.approx(1, abs=0.05)
    assert weakly_measured(solver) == pytest.approx(1, abs=0.1)
