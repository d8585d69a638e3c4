"""torchsde's methods on any grid, any rank, either direction, with our own increments."""

import random

import numpy as np
import pytest
import torch
import torchsde
from problems import BrownianPath

from sdeflow import (
    GBM,
    OU,
    SDE,
    VP,
    ArgumentError,
    Denoiser,
    EulerMaruyama,
    NonFiniteError,
    PairingError,
    TorchSDE,
    integrate,
    reverse,
    sample,
    trajectory,
)
from sdeflow._torchsde import _Increments
from sdeflow.backends import SDE_METHODS
from sdeflow.grid import karras, log_snr

DOUBLE = {"dtype": torch.float64}
UNEVEN = torch.tensor([0.0, 0.1, 0.15, 0.4, 1.0], **DOUBLE)
STRATONOVICH = [m for m, (calculus, _) in SDE_METHODS.items() if calculus == "stratonovich"]
every_method = pytest.mark.parametrize("method", SDE_METHODS)


def pull(x, t):
    return -torch.tanh(x)


# ---- the traps of the library's own driver


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
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


# ---- the library itself, where it can go


class Replay(torchsde.BaseBrownian):
    """The increments of a run of ours, for torchsde's driver."""

    def __init__(self, normals, h):
        super().__init__()
        self.normals, self.h = normals, h

    def __call__(self, ta, tb=None, return_U=False, return_A=False):
        z, other = self.normals[round(float(ta) / self.h)]
        w, u = self.h**0.5 * z, self.h**1.5 * (z / 2 + other / 12**0.5)
        if return_U:
            return w, u
        return (w, torch.zeros(*w.shape, w.shape[1], **DOUBLE)) if return_A else w

    def __repr__(self):
        return "Replay()"

    @property
    def shape(self):
        return self.normals.shape[2:]

    levy_area_approximation = "foster"
    dtype = property(lambda self: torch.float64)
    device = property(lambda self: torch.device("cpu"))


class Theirs(torch.nn.Module):
    def __init__(self, sde, calculus):
        super().__init__()
        self.sde, self.sde_type, self.noise_type = sde, calculus, "diagonal"

    def f(self, t, y):
        return self.sde.drift(y, t)

    def g(self, t, y):
        return self.sde.diffusion(y, t).expand(y.shape)


@every_method
def test_a_run_is_torchsde_s_own_on_an_even_grid(method):
    """Methods of Stratonovich's calculus on additive noise."""
    calculus, _ = SDE_METHODS[method]
    sde = OU(1.5, 0.7) if calculus == "stratonovich" else GBM(0.3, 0.7)
    ts, y = torch.linspace(0, 1, 9, **DOUBLE), torch.rand(4, 3, **DOUBLE) + 0.5
    normals = torch.randn(8, 2, 4, 3, **DOUBLE)
    brownian = Replay(normals, 1 / 8)
    theirs = torchsde.sdeint(
        Theirs(sde, calculus), y, ts, bm=brownian, method=method, dt=1 / 8, dt_min=1e-9
    )
    draws = {}

    def noise(t, s):
        k = round(float(t) * 8)
        draws[k] = draws.get(k, -1) + 1
        return normals[k, draws[k]]

    ours = integrate(sde, y, ts, TorchSDE(method), noise=noise, keep=True).path
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# ---- state-dependent and matrix noise


@pytest.mark.parametrize("method", STRATONOVICH)
def test_a_stratonovich_method_is_refused_on_state_dependent_noise(method):
    for process, ts in ((GBM(), UNEVEN), (reverse(GBM(), pull), UNEVEN.flip(0))):
        with pytest.raises(PairingError, match=f"{method} converges to the Stratonovich .*'srk'"):
            integrate(process, torch.ones(2, 1), ts, TorchSDE(method))


@pytest.mark.parametrize(("method", "order"), [("euler", 0.5), ("milstein", 1), ("srk", 1.5)])
def test_the_strong_order_on_geometric_brownian_motion(method, order):
    """Against the closed form, on the same 4,000 paths."""
    path, steps = BrownianPath((4000, 1), 128), [16, 128]
    exact = torch.exp(0.3 - 0.7**2 / 2 + 0.7 * path.end)
    errors = []
    for n in steps:
        ts = torch.linspace(0, 1, n + 1, **DOUBLE)
        start = torch.ones(4000, 1, **DOUBLE)
        end = integrate(GBM(0.3, 0.7), start, ts, TorchSDE(method), noise=path.noise(n)).x
        errors.append(float((end - exact).abs().mean()))
    slope = np.log(errors[0] / errors[1]) / np.log(8)
    assert slope == pytest.approx(order, abs=0.1)


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


@pytest.mark.parametrize("method", ["milstein", "srk"])
def test_methods_for_elementwise_noise_refuse_a_matrix(method):
    with pytest.raises(PairingError, match=rf"{method} takes elementwise noise; .*'euler'"):
        integrate(Matrix(), torch.ones(2, 3), UNEVEN, TorchSDE(method))


@pytest.mark.parametrize("backwards", [False, True])
def test_the_integral_of_the_increment_has_its_exact_law(backwards):
    """Var W = 1, Var U = 1/3 and Cov(W, U) = 1/2, those of W_1 and of the integral of W over
    [0, 1]; read off on unit vectors."""
    unit = iter(torch.eye(2, **DOUBLE)[:, :, None])
    increments = _Increments(OU(), torch.zeros(1, 1, **DOUBLE), lambda t, s: next(unit))
    increments.begin(*(UNEVEN[:2].flip(0) if backwards else UNEVEN[:2]))
    w, u = increments(torch.zeros(()), torch.ones(()), return_U=True)
    assert torch.equal(increments(torch.zeros(()), torch.ones(())), w)
    law = torch.cat((w, u), 1).T @ torch.cat((w, u), 1)
    torch.testing.assert_close(law, torch.tensor([[1, 1 / 2], [1 / 2, 1 / 3]], **DOUBLE))


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
