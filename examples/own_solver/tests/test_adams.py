"""The certificate of the solver: its order, its laws, and what it leaves alone."""

import pytest
from sdeflow_adams import Adams2

import sdeflow
from sdeflow.testing import check_solver


def test_the_solver_is_certified():
    check_solver(Adams2()).raise_if_failed()


def test_a_noisy_process_is_refused():
    noisy = sdeflow.reverse(sdeflow.VP(), lambda x, t: -x)
    with pytest.raises(sdeflow.PairingError, match="probability_flow"):
        sdeflow.sample(noisy, (4, 1), solver=Adams2())
