"""Random SDEs, grids and Gaussian data, for hypothesis. Steps are measured in lambda =
log(alpha/sigma), the clock that all the SDEs share."""

import re
from typing import NamedTuple

import torch
from hypothesis import strategies as st

from sdeflow import EDM, OU, VE, VP, Cosine, RectifiedFlow, SubVP

numbers = st.floats
sdes = st.one_of(
    st.builds(VP, beta_min=numbers(0.05, 0.5), beta_max=numbers(10, 30)),
    st.builds(SubVP, beta_min=numbers(0.05, 0.5), beta_max=numbers(10, 30)),
    st.builds(VE, sigma_min=numbers(0.005, 0.05), sigma_max=numbers(20, 100)),
    st.builds(Cosine, s=numbers(0.004, 0.02)),
    st.builds(EDM, T=numbers(20, 100)),
    st.builds(RectifiedFlow),
    st.builds(OU, theta=numbers(0.7, 2), volatility=numbers(0.5, 2)),
)
etas = st.sampled_from((0.0, 0.3, 1.0)) | numbers(0.1, 1)


def label(value):
    """A test's id: repr without addresses, the same in every process of pytest-xdist."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


class Case(NamedTuple):
    sde: object
    ts: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor
    eta: float


def times(sde, low, span, ratios):
    """A grid from lambda = low to low + span, its steps in the given ratios."""
    steps = torch.tensor(ratios, dtype=torch.float64).cumsum(0)
    part = torch.cat((torch.zeros(1, dtype=torch.float64), steps / steps[-1]))
    return sde.time_of_log_snr(2 * (low + span * part))


@st.composite
def cases(draw, etas=etas, steps=(15, 60), ratio=2.0, log_std=(-2, 1), to_zero=False):
    sde = draw(sdes)
    ratios = draw(st.lists(numbers(1, ratio), min_size=steps[0], max_size=steps[1]))
    ts = times(sde, draw(numbers(-2.5, -1)), draw(numbers(1, 4)), ratios)
    if to_zero and draw(st.booleans()):
        ts = torch.cat((ts, torch.zeros(1, dtype=torch.float64)))
    mean = draw(st.tuples(*[numbers(-2, 2)] * 3))
    std = draw(st.tuples(*[numbers(*log_std)] * 3))
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (mean, std))
    return Case(sde, ts, mean, (2 * std).exp(), draw(etas))


class BrownianPath:
    """One Brownian path on `fine` steps of [0, 1], seen as unit normals by runs of fewer steps.

    A second call for the same interval gives normals of its own, as torchsde's SRK needs them.
    """

    def __init__(self, shape, fine, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.fine = self._normals((fine, *shape))
        self.end = self.fine.sum(0) / fine**0.5

    def _normals(self, shape):
        return torch.randn(shape, dtype=torch.float64, generator=self.generator)

    def noise(self, steps):
        """A source for a run over [0, 1] in equal steps."""
        blocks = self.fine.unflatten(0, (steps, -1))
        coarse = blocks.sum(1) / blocks.shape[1] ** 0.5
        seen = set()

        def draw(t, s):
            k = round(float(t) * steps)
            if k in seen:
                return self._normals(coarse.shape[1:])
            seen.add(k)
            return coarse[k]

        return draw
