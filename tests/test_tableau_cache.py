"""Tableaux are remembered by value: the same configuration once, never one for another."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from sdeflow_plugins.solvers.ddim import DDIM
from sdeflow_plugins.solvers.dpmpp import DPMpp2M

from sdeflow import (
    OU,
    VE,
    VP,
    Denoiser,
    GaussianSDE,
    ReverseSDE,
    integrate,
    probability_flow,
    reverse,
    trace,
)
from sdeflow.denoiser import PREDICTIONS
from sdeflow.grid import log_snr

TS = log_snr(VP(), 8)


def net(x, t):
    return torch.tanh(x)


def assert_it_is_the_plain_loop(process, ts=TS):
    x = torch.randn(4, 3, dtype=torch.float64)
    fused, plain = (integrate(process, x, ts, DPMpp2M(), seed=1, grad=g) for g in (False, True))
    assert fused.fused and not plain.fused
    assert (fused.x - plain.x).abs().max() <= 1e-12 * plain.x.abs().max()


class Scaled(VP):
    """Equal to another of its kind for a dataclass's ==, whatever its factor."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def sigma(self, t):
        return self.factor * super().sigma(t)


@dataclass(frozen=True)
class Hidden(VP):
    """A field that == leaves out."""

    factor: float = dataclasses.field(default=1.0, compare=False)

    def sigma(self, t):
        return self.factor * super().sigma(t)


class Mutable(GaussianSDE):
    factor = 1.0

    def alpha(self, t):
        return torch.exp(-t)

    def sigma(self, t):
        return self.factor * t


def mutated(sde, factor):
    sde.factor = factor
    return sde


ONE = Mutable()
FAMILIES = {
    "parameters": [lambda: VP(0.1), lambda: VP(0.2)],
    "classes": [lambda: VP(), lambda: VE(), lambda: OU()],
    "hidden attributes": [lambda: Scaled(1.0), lambda: Scaled(2.0)],
    "fields not compared": [lambda: Hidden(factor=1.0), lambda: Hidden(factor=2.0)],
    "mutation": [lambda: mutated(ONE, 1.0), lambda: mutated(ONE, 2.0)],
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_tableaux_of_different_sdes_are_not_confused(family):
    for make in family:
        assert_it_is_the_plain_loop(probability_flow(make(), lambda x, t: -x))


def test_tableaux_of_different_networks_eta_and_grids_are_not_confused():
    for sigma_data in (0.5, 1.0):
        for prediction in PREDICTIONS:
            for eta in (0.0, 0.5):
                for ts in (TS, TS[1:], TS[[0, 2, 3, 4, 5, 6, 7, 8]]):
                    denoiser = Denoiser(net, VP(), prediction, sigma_data)
                    assert_it_is_the_plain_loop(ReverseSDE(VP(), denoiser, eta), ts)


def test_a_tableau_is_made_once_for_one_configuration():
    process, other = reverse(VP(), net), reverse(VP(), lambda x, t: -x)
    assert trace(DPMpp2M(), process, TS) is trace(DPMpp2M(), other, TS.clone())
    assert trace(DPMpp2M(), process, TS) is not trace(DDIM(), process, TS)


def test_the_cache_stands_threads_that_push_each_other_out():
    def run(k):
        ts = log_snr(VP(), 2, t_max=1 - 1e-6 * (k % 100))
        return float(trace(DDIM(), probability_flow(VP(), net), ts).rows[0].t)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(run, range(800)))
    assert found == [1 - 1e-6 * (k % 100) for k in range(800)]
