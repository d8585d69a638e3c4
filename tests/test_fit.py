"""Training in memory: `fit`."""

import pytest
import torch
from sdeflow_plugins.data import TensorData
from sdeflow_plugins.train.engine import make_fabric
from sdeflow_plugins.train.fit import fit
from sdeflow_plugins.train.loop import training
from sdeflow_plugins.train.recipe import Recipe
from sdeflow_plugins.train.state import State

from sdeflow import ArgumentError, Denoiser, probability_flow, sample

SMALL = Recipe(
    data="moons",
    data_options={"n": 64},
    network="mlp",
    network_options={"width": 8, "depth": 1},
    steps=4,
    batch_size=16,
    warmup=1,
    device="cpu",
)


def test_fit_is_the_loop_with_the_averaged_weights():
    denoiser = fit(SMALL, quiet=True)
    dataset, fabric = SMALL.make_dataset(), make_fabric(SMALL)
    state = State.fresh(SMALL, dataset.shape, fabric.device)
    list(training(SMALL, dataset, state, fabric))
    assert isinstance(denoiser, Denoiser)
    x, t = torch.randn(5, 2), torch.full((5,), 0.4)
    made, expected = denoiser(x, t), SMALL.make_denoiser(state.ema.module.eval())(x, t)
    assert torch.equal(made, expected)
    assert not torch.equal(made, SMALL.make_denoiser(state.network.eval())(x, t))


def test_fit_takes_any_data_set_and_loss(capsys):
    data = TensorData(torch.randn(20, 3).clamp(-1, 1))
    seen = []

    def loss(denoiser, batch):
        seen.append(batch.x0.shape)
        return (denoiser.denoise(batch.x0, batch.t) - batch.x0).square().mean()

    denoiser = fit(SMALL, data, loss)
    assert seen == [(16, 3)] * 4 and "train" in capsys.readouterr().err
    assert (
        sample(probability_flow(denoiser.sde, denoiser), (2, 3), steps=3, seed=0).x.isfinite().all()
    )


def test_fit_of_classes_needs_labels():
    with pytest.raises(ArgumentError, match="no labels"):
        fit(Recipe(**{**vars(SMALL), "conditional": True}), TensorData(torch.zeros(20, 2)))
