"""Two theorems about the solver, and sdeflow.testing to check them."""

import pytest
import torch
from sdeflow_adams import Adams2

import sdeflow
from sdeflow.testing import GaussianData, order, output_law, strong_errors


def test_the_order_is_two():
    steps = [160, 320]
    errors = strong_errors(Adams2(), sdeflow.VP(), steps)
    assert order(errors, steps) == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("sde", [sdeflow.VP(), sdeflow.EDM(), sdeflow.Cosine()])
def test_the_law_of_one_point_data_is_exact(sde):
    point, ts = torch.tensor([0.7]).double(), sdeflow.get("grid", "karras")(sde, 6)
    data = GaussianData(sde, point, torch.zeros(1).double())
    flow = sdeflow.probability_flow(sde, data)
    made = output_law(flow, ts, "adams2", *data.law(ts[0]))
    for got, wanted in zip(made, data.law(ts[-1]), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=0)


def test_a_noisy_process_is_refused():
    sde = sdeflow.VP()
    noisy = sdeflow.reverse(sde, lambda x, t: -x)
    with pytest.raises(sdeflow.PairingError, match="probability_flow"):
        sdeflow.sample(noisy, (4, 1), solver=Adams2())
