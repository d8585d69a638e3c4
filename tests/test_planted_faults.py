"""The certificate rejects every historical mistake, by the check that is meant for it.

Each fault runs the group of checks that is meant to catch it; a few run the whole.
"""

import pytest
from faults import FAULTS, HONEST
from problems import label

from sdeflow.testing import check_solver


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_planted_fault_is_rejected_by_the_check_that_is_meant_for_it(fault):
    group, check = FAULTS[fault]
    report = check_solver(fault, only=() if group == "runs" else (group,))
    assert check in [failure.name for failure in report.failures], str(report)


def test_there_are_enough_faults():
    assert len(FAULTS) >= 30


@pytest.mark.parametrize("k", [0, 17, 34], ids=lambda k: type(list(FAULTS)[k]).__name__)
def test_a_planted_fault_is_rejected_by_the_whole(k):
    fault = list(FAULTS)[k]
    report = check_solver(fault)
    assert not report.ok and FAULTS[fault][1] in [failure.name for failure in report.failures]


@pytest.mark.parametrize("solver", HONEST, ids=label)
def test_what_the_faults_are_planted_in_is_right(solver):
    check_solver(solver).raise_if_failed()
