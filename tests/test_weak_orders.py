"""Weak orders on noise that depends on the state, exactly: no sampling, so no blur.

The normals of one step are Gauss-Hermite nodes, which integrate the polynomials that a step makes
of them without error. On linear SDEs the moments of a run are then products of those of its steps.
(The certificate, tests/test_certified.py, has the weak orders on additive noise.)
"""

import itertools
import math

import numpy
import pytest
import torch

from sdeflow import SDE, get, integrate
from sdeflow.testing import KNOWN

DOUBLE = {"dtype": torch.float64}
WEAK = {
    # solver: its weak order on noise that depends on the state
    "euler_maruyama": 1,
    "milstein": 1,
    "euler_heun": 1,
    "heun": 1,
    "srk": 1.5,  # better on the moments of many SDEs
    "platen": 2,
}


class Nodes:
    """Every combination of Gauss-Hermite nodes for the normals of `count` Wiener processes, and of
    nodes, or signs, for those of their areas."""

    def __init__(self, count, size, areas):
        nodes, weights = numpy.polynomial.hermite_e.hermegauss(size)
        normal = list(zip(nodes, weights / weights.sum(), strict=True))
        coin = [(-1.0, 0.5), (1.0, 0.5)]
        rows = list(itertools.product(*[normal] * count, *[areas and normal or coin] * count))
        values = torch.tensor([[value for value, _ in row] for row in rows], **DOUBLE)
        self.weights = torch.tensor([math.prod(w for _, w in row) for row in rows], **DOUBLE)
        self.z, self.zeta = values[:, :count], values[:, count:]

    def mean(self, values):
        return torch.tensordot(self.weights, values, 1)

    def __call__(self, t, s):
        return self.z

    def area(self, t, s):
        return self.zeta

    def step(self, sde, x, t, s, solver):
        """One step from x, (d,), at every node."""
        ts = torch.stack((t, s))
        return integrate(sde, x.expand(len(self.z), -1), ts, solver, noise=self).x


def slope(errors):
    return math.log2(errors[0] / errors[-1]) / (len(errors) - 1)


class Growth(SDE):
    """dx = (1/2 + t) x dt + (2/5 + t/2) x dw: E x^p is known."""

    def drift(self, x, t):
        return (0.5 + t) * x

    def diffusion(self, x, t):
        return (0.4 + 0.5 * t) * x

    def moment(self, p):
        return math.exp(p * 1.0 + p * (p - 1) / 2 * (0.16 + 0.2 + 0.25 / 3))


class ScalarGrowth(Growth):
    noise = "scalar"


@pytest.mark.parametrize("sde", [Growth(), ScalarGrowth()], ids=lambda sde: sde.noise)
@pytest.mark.parametrize("name", WEAK)
def test_the_weak_order_on_linear_noise_is_the_documented(name, sde):
    """The first three moments at t = 1."""
    nodes, one = Nodes(1, 10, areas=True), torch.ones(1, **DOUBLE)
    for p in (1, 2, 3):
        errors = []
        for steps in (32, 64, 128):
            ts = torch.linspace(0, 1, steps + 1, **DOUBLE)
            made = 1.0
            for t, s in itertools.pairwise(ts):
                made *= float(nodes.mean(nodes.step(sde, one, t, s, get("solver", name)) ** p))
            errors.append(abs(made / sde.moment(p) - 1))
        assert slope(errors) > WEAK[name] - 0.1
        assert slope(errors) < WEAK[name] + 0.1 or name == "srk"


class ThreeMatrices(SDE):
    """dX = F X dt + sum_k A_k X dw_k in the plane, with three A_k that do not commute."""

    noise = "matrix"
    F = torch.tensor([[-0.3, 0.4], [-0.2, 0.1]], **DOUBLE)
    A = torch.tensor(
        [[[0.3, 0.5], [0.0, 0.2]], [[0.1, 0.0], [0.6, -0.2]], [[0.0, -0.4], [0.4, 0.1]]], **DOUBLE
    )

    def drift(self, x, t):
        return x @ self.F.T

    def diffusion(self, x, t):
        return torch.einsum("kij,bj->bik", self.A, x)

    def second_moments(self):
        """The map of E X X^T over [0, 1], as a 4 x 4 matrix."""
        eye = torch.eye(2, **DOUBLE)
        rate = torch.kron(self.F, eye) + torch.kron(eye, self.F)
        return torch.linalg.matrix_exp(rate + sum(torch.kron(a, a) for a in self.A))


def second_moment_errors(name, nodes, steps):
    sde, eye = ThreeMatrices(), torch.eye(2, **DOUBLE)
    errors = []
    for n in steps:
        t, s = torch.tensor([0.0, 1 / n], **DOUBLE)
        maps = torch.stack([nodes.step(sde, e, t, s, get("solver", name)) for e in eye], 2)
        squared = torch.einsum("bij,bkl->bikjl", maps, maps).reshape(-1, 4, 4)
        made = torch.linalg.matrix_power(nodes.mean(squared), n)
        errors.append(float((made - sde.second_moments()).norm()))
    return errors


@pytest.mark.parametrize("name", ["euler_maruyama", "euler_heun", "heun", "platen"])
def test_the_weak_order_on_noise_that_does_not_commute_is_the_documented(name):
    errors = second_moment_errors(name, Nodes(3, 5, areas=False), (32, 64, 128))
    assert slope(errors) == pytest.approx(WEAK[name], abs=0.1)


def test_random_signs_for_the_levy_areas_are_what_makes_the_second_order():
    """Always the same sign instead: no convergence."""
    nodes = Nodes(3, 5, areas=False)
    nodes.zeta = nodes.zeta.abs()
    errors = second_moment_errors("platen", nodes, (32, 64, 128))
    assert slope(errors) < 0.5


@pytest.mark.parametrize("problem", ["linear", "cubic", "stratonovich_linear"])
@pytest.mark.parametrize("name", WEAK)
def test_the_error_of_the_law_after_one_step_is_an_order_smaller(name, problem):
    """E phi(x_h) against that of the solution, for phi(x) = x, x^2, e^x: errors of h^(p+1)."""
    known, nodes = KNOWN[problem], Nodes(1, 24, areas=True)
    errors = []
    for h in (1 / 16, 1 / 32, 1 / 64):
        t, s = torch.tensor([0.0, h], **DOUBLE)
        made = nodes.step(known.sde, known.start, t, s, get("solver", name))
        exact = known.solution(known.start, s, math.sqrt(h) * nodes.z)
        errors.append(
            sum(
                abs(float(nodes.mean(phi(made) - phi(exact))))
                for phi in (torch.clone, torch.square, torch.exp)
            )
        )
    assert slope(errors) > WEAK[name] + 1 - 0.15
