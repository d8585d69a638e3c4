"""Every eta keeps the marginals: both sides of the Fokker-Planck equation, at a point.

For any density p with score s, the forward SDE and its eta-family, run down, must change p at the
same rate; random smooth SDEs with every kind of noise, in both calculi, by brute force.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kinds import FAULTS, KINDS, TIME, Smooth, full, seeds, start
from torch.autograd.functional import jacobian

from sdeflow import ReverseSDE


class Bumps:
    """An arbitrary smooth density: two Gaussian bumps."""

    def __init__(self, d, seed):
        random = torch.Generator().manual_seed(seed)
        self.centers = torch.randn(2, d, generator=random, dtype=torch.float64)

    def log_density(self, x):
        """Of each sample of x, up to a constant."""
        far = (x.reshape(len(x), 1, -1) - self.centers).square().sum(2)
        return torch.logsumexp(-far * torch.tensor([0.5, 0.8], dtype=torch.float64), 1)

    def score(self, x, t):
        with torch.enable_grad():
            y = x if x.requires_grad else x.detach().requires_grad_()
            p = self.log_density(y).sum()
            return torch.autograd.grad(p, y, create_graph=x.requires_grad)[0]


def change(sde, density, x, drift, eta=1.0, sign=1):
    """d p/dt / p(x) = (-div(F p) + sign eta^2/2 sum_ij d_ij (a_ij p))/p at one state x (d,), for a
    process run up in time (sign 1) or down (sign -1) with the Ito drift F and noise eta G."""
    shape = (1, *sde.shape)
    at = float(density.log_density(x.reshape(shape)))

    def p(y):  # one at x
        return (density.log_density(y.reshape(shape)) - at).exp()

    def spread(y):
        g = full(sde, y)
        return ((g @ g.T) * p(y)).reshape(-1)

    def flux(y):
        along = jacobian(spread, y, create_graph=True).reshape(sde.d, sde.d, sde.d)
        moved = drift(y.reshape(shape)).reshape(sde.d) * p(y)
        return sign * eta**2 / 2 * torch.einsum("ijj->i", along) - moved

    return float(jacobian(flux, x).trace())


def both_sides(process, density, x):
    """The change of p at x under the forward SDE, and under the process."""
    sde = process.forward

    def forward_drift(y):  # in the Ito sense, by brute force
        drift = sde.drift(y, TIME)
        if sde.calculus == "ito":
            return drift
        flat = y.reshape(sde.d)
        jac = jacobian(lambda z: full(sde, z), flat, create_graph=True)
        return drift + torch.einsum("ikj,jk->i", jac, full(sde, flat)).reshape(y.shape) / 2

    forward = change(sde, density, x, forward_drift)
    back = change(sde, density, x, lambda y: process.drift(y, TIME), process.eta, -1)
    return forward, back


class SmoothStratonovich(Smooth):
    calculus = "stratonovich"


small = st.sampled_from(((), (1,), (2,), (1, 2), (2, 1, 2)))


@given(st.sampled_from(KINDS), small, st.booleans(), st.sampled_from((0.0, 0.4, 1.0)), seeds)
def test_every_eta_moves_a_density_as_the_forward_sde_does(kind, shape, ito, eta, seed):
    sde = (Smooth if ito else SmoothStratonovich)(kind, shape, seed)
    density = Bumps(sde.d, seed)
    x = start(sde, 1).reshape(sde.d)
    forward, back = both_sides(ReverseSDE(sde, density.score, eta), density, x)
    assert back == pytest.approx(forward, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS[:-1])
def test_the_identity_fails_for_planted_faults(kind, eta, fault):
    sde = Smooth(kind, (2,), 7)
    density = Bumps(2, 7)
    forward, back = both_sides(
        fault(sde, density.score, eta), density, torch.tensor([0.3, -0.5]).double()
    )
    assert abs(forward - back) > 0.01
