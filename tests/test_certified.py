"""Every registered solver holds its certificate: orders, laws, behaviour. None needs an entry."""

import pytest

from sdeflow import catalogue
from sdeflow.testing import check_solver

OWN = [name for name, entry in catalogue("solver").items() if entry.distribution == "sdeflow"]


@pytest.mark.parametrize("name", OWN)
def test_every_registered_solver_is_certified(name):
    check_solver(name).raise_if_failed()
