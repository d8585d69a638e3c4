"""Settings and fixtures shared by all tests: one thread, fixed seeds, no deadlines."""

import pytest
import torch
from hypothesis import settings

from sdeflow import EDM, OU, VE, VP, Cosine, RectifiedFlow, SubVP

torch.set_num_threads(1)
settings.register_profile(
    "sdeflow", derandomize=True, database=None, deadline=None, max_examples=50
)
settings.load_profile("sdeflow")


@pytest.fixture(autouse=True)
def seeded():
    """Every test begins at the same place of torch's global stream."""
    torch.manual_seed(0)


@pytest.fixture(
    params=[VP(), SubVP(), VE(), Cosine(), EDM(), RectifiedFlow(), OU()],
    ids=lambda sde: type(sde).__name__,
    scope="session",
)
def sde(request):
    """Each bundled Gaussian SDE, with its paper's defaults."""
    return request.param
