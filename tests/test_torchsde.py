"""torchsde's methods on any grid, any rank, either direction, with our own increments."""

import random

import numpy as np
import pytest
import torch

from sdeflow import (
    GBM,
    OU,
    SDE,
    VP,
    ArgumentError,
    Denoiser,
    EulerMaruyama,
    NonFiniteError,
    TorchSDE,
    integrate,
    reverse,
    sample,
    trajectory,
)
from sdeflow.backends import SDE_METHODS
from sdeflow.grid import karras, log_snr

DOUBLE = {"dtype": torch.float64}
UNEVEN = torch.tensor([0.0, 0.1, 0.15, 0.4, 1.0], **DOUBLE)
STRATONOVICH = [m for m, known in SDE_METHODS.items() if known.calculus == "stratonovich"]
MATRIX = [m for m, known in SDE_METHODS.items() if known.matrix]
every_method = pytest.mark.parametrize("method", SDE_METHODS)


def pull(x, t):
    return -torch.tanh(x)


# ---- the traps of the library's own driver


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("backwards", [False, True])
def test_euler_is_euler_maruyama_on_any_grid_and_rank_in_both_directions(
    shape, dtype, close, backwards
):
    process, ts = (reverse(VP(), pull), karras(VP(), 9)) if backwards else (GBM(0.3, 0.7), UNEVEN)
    x = torch.rand(5, *shape, dtype=dtype)
    theirs, ours = (
        integrate(process, x, ts, solver, seed=1, keep=True).path
        for solver in (TorchSDE("euler"), EulerMaruyama())
    )
    assert theirs.shape == (len(ts), *x.shape) and theirs.dtype == dtype
    torch.testing.assert_close(theirs, ours, rtol=close, atol=close)


@every_method
@pytest.mark.parametrize("shape", [(), (2, 3), (2, 3, 4)])
def test_states_of_any_rank_are_their_components(method, shape):
    process, ts = reverse(VP(), pull), log_snr(VP(), 6)
    x = torch.randn(4, *shape, **DOUBLE)
    many = integrate(process, x, ts, TorchSDE(method), seed=1).x
    flat = integrate(process, x.reshape(4, -1), ts, TorchSDE(method), seed=1).x
    torch.testing.assert_close(many, flat.reshape(x.shape), rtol=1e-13, atol=0)


@every_method
def test_an_empty_batch_stays_empty(method):
    assert sample(reverse(VP(), pull), (0, 3), solver=TorchSDE(method), seed=1).x.shape == (0, 3)


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_state_keeps_its_dtype(method, dtype):
    def run(dtype):
        x = torch.linspace(-1, 1, 8, dtype=dtype).view(4, 2)
        return integrate(
            reverse(VP(), pull), x, UNEVEN.flip(0), TorchSDE(method), noise=lambda t, s: 0 * x
        ).x

    assert run(dtype).dtype == dtype
    rounding = 40 * torch.finfo(dtype).eps
    torch.testing.assert_close(run(dtype).double(), run(torch.float64), rtol=0, atol=rounding)


def test_twenty_thousand_steps_do_not_recurse():
    ts = torch.linspace(0, 5, 20_001, **DOUBLE)
    assert integrate(OU(), torch.ones(1, 1), ts, TorchSDE(), seed=1).nfe == 20_000


@every_method
def test_no_global_generator_is_read_or_moved(method):
    def states():
        return (torch.get_rng_state().numpy().tobytes(), str(np.random.get_state()))

    before = (*states(), random.getstate())
    one = sample(reverse(VP(), pull), (4, 2), solver=TorchSDE(method), steps=4, seed=7).x
    assert (*states(), random.getstate()) == before
    torch.manual_seed(123)
    assert torch.equal(
        one, sample(reverse(VP(), pull), (4, 2), solver=TorchSDE(method), steps=4, seed=7).x
    )
    other = sample(reverse(VP(), pull), (4, 2), solver=TorchSDE(method), steps=4, seed=8).x
    assert not torch.equal(one, other)


@every_method
def test_a_nan_is_named_with_its_step(method):
    def broken(x, t):
        return x / 0 if 0.3 < float(t) < 0.5 else -x

    ts = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2], **DOUBLE)
    # Methods that look ahead meet the fault from t = 0.6 on, the others in the step after it.
    with pytest.raises(NonFiniteError, match=r"at step [34] of 4, from t=0\.[64]"):
        integrate(reverse(VP(), broken), torch.ones(2, 3), ts, TorchSDE(method), seed=1)
    with pytest.raises(NonFiniteError, match=r"at step [34] of 4"):
        list(trajectory(reverse(VP(), broken), torch.ones(2, 3), ts, TorchSDE(method), seed=1))


@every_method
def test_gradients_flow_through(method):
    x = torch.randn(3, 2, **DOUBLE, requires_grad=True)

    def end(x):
        return integrate(
            reverse(VP(), pull), x, UNEVEN.flip(0), TorchSDE(method), seed=1, grad=True
        ).x

    assert torch.autograd.gradcheck(end, (x,))


# ---- matrices


class Matrix(SDE):
    """Ornstein-Uhlenbeck with the noise of one Wiener process a component, as a matrix."""

    noise = "matrix"
    additive = True

    def drift(self, x, t):
        return -x

    def diffusion(self, x, t):
        scale = torch.tensor([0.5, 1.0, 2.0], dtype=x.dtype) * (1 + t)
        return torch.diag(scale).expand(x.shape[0], 3, 3)


class Elementwise(SDE):
    additive = True
    drift = Matrix.drift

    def diffusion(self, x, t):
        return torch.tensor([0.5, 1.0, 2.0], dtype=x.dtype) * (1 + t)


@pytest.mark.parametrize("method", ["euler", *STRATONOVICH])
def test_a_diagonal_matrix_is_elementwise_noise(method):
    x = torch.randn(4, 3, **DOUBLE)
    matrix, elementwise = (
        integrate(sde, x, UNEVEN, TorchSDE(method), seed=1).x for sde in (Matrix(), Elementwise())
    )
    torch.testing.assert_close(matrix, elementwise, rtol=1e-12, atol=1e-12)


def test_euler_takes_a_matrix_that_looks_at_the_state():
    class Shared(SDE):
        noise = "matrix"

        def drift(self, x, t):
            return -x

        def diffusion(self, x, t):
            return torch.stack((x, 1 + 0 * x), -1)

    x = torch.randn(4, 2, 3, **DOUBLE)
    theirs, ours = (
        integrate(Shared(), x, UNEVEN, solver, seed=1).x
        for solver in (TorchSDE("euler"), EulerMaruyama())
    )
    torch.testing.assert_close(theirs, ours, rtol=1e-12, atol=1e-12)


def test_milstein_is_euler_where_the_noise_is_additive():
    process, ts = reverse(VP(), Denoiser(lambda x, t: torch.tanh(x), VP(), "v")), log_snr(VP(), 6)
    x = torch.randn(4, 2, **DOUBLE)
    euler, milstein = (
        integrate(process, x, ts, TorchSDE(m), seed=1).x for m in ("euler", "milstein")
    )
    torch.testing.assert_close(euler, milstein, rtol=1e-13, atol=0)


def test_an_unknown_method_is_told_its_close_matches():
    with pytest.raises(ArgumentError, match=r"method='millstein' is unknown; .*'milstein'"):
        TorchSDE("millstein")
