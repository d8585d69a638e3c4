"""Buffers are reused only where nobody can see it; the numbers are those of the plain loop."""

import numpy as np
import pytest
import torch
from sdeflow_plugins.solvers.ddim import DDIM
from sdeflow_plugins.solvers.ddpm import DDPM
from sdeflow_plugins.solvers.dpmpp import DPMpp1S, DPMpp2M, DPMpp2S

from sdeflow import (
    EDM,
    VP,
    Denoiser,
    EulerMaruyama,
    Heun,
    ShapeError,
    integrate,
    reverse,
    sample,
    trajectory,
)
from sdeflow.grid import karras, log_snr

SOLVERS = (EulerMaruyama(), Heun(), DDIM(), DDPM(), DPMpp1S(), DPMpp2S(), DPMpp2M())
TS = log_snr(VP(), 8)
SHAPE = (4, 3)
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=repr)
every_prediction = pytest.mark.parametrize("prediction", ["data", "noise", "v", "edm"])


def start(dtype=torch.float64):
    return torch.randn(SHAPE, dtype=dtype)


def answer(x, t):
    return torch.tanh(x) + t[:, None].cos()


def run(net, prediction, solver, x, fused=True, **options):
    process = reverse(VP(), Denoiser(net, VP(), prediction))
    solution = integrate(process, x, TS, solver, seed=1, grad=not fused, **options)
    assert solution.fused == fused
    return solution


# ---- networks with habits


class ReturnsItsInput:
    def __call__(self, x, t):
        return x


class ReturnsAView:
    def __call__(self, x, t):
        return x.view(-1).view(SHAPE)


class ReturnsOneConstant:
    def __init__(self):
        self.constant = torch.linspace(-1, 1, 12, dtype=torch.float64).view(SHAPE)

    def __call__(self, x, t):
        return self.constant


class ReturnsPartOfALargerTensor:
    """As a network that also learns a variance does."""

    def __call__(self, x, t):
        return torch.cat((answer(x, t), x), 1)[:, :3]


class WritesIntoOneBuffer:
    """As a network captured in a graph does."""

    def __init__(self):
        self.buffer = torch.empty(SHAPE, dtype=torch.float64)

    def __call__(self, x, t):
        return self.buffer.copy_(answer(x, t))


class ReturnsTheInputBefore:
    """Its first answer is its first input."""

    def __init__(self):
        self.before = None

    def __call__(self, x, t):
        before = x if self.before is None else self.before
        self.before = x
        return before


HABITS = (
    ReturnsItsInput,
    ReturnsAView,
    ReturnsOneConstant,
    ReturnsPartOfALargerTensor,
    WritesIntoOneBuffer,
    ReturnsTheInputBefore,
)


@every_solver
@every_prediction
@pytest.mark.parametrize("habit", HABITS)
def test_a_network_may_return_what_it_likes(habit, prediction, solver):
    x = start()
    fused, plain = (run(habit(), prediction, solver, x, fused=road).x for road in (True, False))
    torch.testing.assert_close(fused, plain, rtol=1e-11, atol=1e-11 * float(plain.abs().max()))


KEEPSAKES = {
    # how the network keeps a tensor
    "itself": lambda x: x,
    "detached": lambda x: x.detach(),
    "a view": lambda x: x[1:, :2],
    "a numpy array": lambda x: x.numpy(),
    "shared by dlpack": lambda x: torch.from_dlpack(x),
    "a numpy array by dlpack": lambda x: np.from_dlpack(x),
    "in a closure": lambda x: lambda: x,
}


@every_solver
@every_prediction
@pytest.mark.parametrize("keep", KEEPSAKES.values(), ids=KEEPSAKES)
def test_what_a_network_keeps_stays_as_it_was(keep, prediction, solver):
    kept, copies = [], []

    def net(x, t):
        out = answer(x, t)
        for tensor in (x, out):
            kept.append(keep(tensor))
            copies.append(keep(tensor.clone()))
        return out

    run(net, prediction, solver, start())
    assert len(kept) >= 16
    for ours, theirs in zip(kept, copies, strict=True):
        ours, theirs = (v() if callable(v) else v for v in (ours, theirs))
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))


@every_solver
def test_a_graph_kept_by_the_network_can_still_be_differentiated(solver):
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    losses = []

    def net(x, t):
        with torch.enable_grad():
            losses.append((torch.tanh(weight * x) ** 2).sum())
        return answer(x, t)

    run(net, "data", solver, start())
    sum(losses).backward()
    assert weight.grad.isfinite().all()


@every_solver
@every_prediction
def test_the_state_given_is_left_alone(prediction, solver):
    x = start()
    before, version = x.clone(), x._version
    solution = run(answer, prediction, solver, x)
    assert torch.equal(x, before)
    assert x._version == version
    assert solution.x.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@every_solver
def test_the_noise_given_is_left_alone_and_may_live_in_one_buffer(solver):
    drawn = torch.randn(20, *SHAPE, dtype=torch.float64)

    class Noise:
        def __init__(self, buffer):
            self.calls, self.buffer = 0, buffer

        def __call__(self, t, s):
            self.calls += 1
            z = drawn[self.calls - 1]
            return z if self.buffer is None else self.buffer.copy_(z)

    process, x, copy = reverse(VP(), Denoiser(answer, VP(), "data")), start(), drawn.clone()
    fresh, reused = (
        integrate(process, x, TS, solver, noise=Noise(buffer)).x
        for buffer in (None, torch.empty(SHAPE, dtype=torch.float64))
    )
    assert torch.equal(drawn, copy)
    assert torch.equal(fresh, reused)


@every_solver
@every_prediction
def test_the_states_of_a_trajectory_stay_valid(prediction, solver):
    process, x = reverse(VP(), Denoiser(answer, VP(), prediction)), start()
    states, copies = [], []
    for _, state in trajectory(process, x, TS, solver, seed=1):
        states.append(state)
        copies.append(state.clone())
    assert all(torch.equal(a, b) for a, b in zip(states, copies, strict=True))
    path = integrate(process, x, TS, solver, seed=1, keep=True).path
    assert torch.equal(torch.stack([x, *states]), path)
    assert torch.equal(path[-1], integrate(process, x, TS, solver, seed=1).x)


# ---- dtypes and layouts


@every_solver
@every_prediction
@pytest.mark.parametrize("of_network", [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_of_another_dtype_leaves_the_state_its_own(of_network, prediction, solver):
    x = start(torch.float32)
    fused, plain = (
        run(lambda x, t: answer(x, t).to(of_network), prediction, solver, x, fused=road).x
        for road in (True, False)
    )
    assert fused.dtype == plain.dtype == torch.float32
    torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))


@every_solver
@pytest.mark.parametrize("prediction", ["data", "v", "edm"])
def test_half_precision_overflows_on_neither_road(prediction, solver):
    """EDM begins at 80 times a unit normal; what a multistep method remembers must fit too. (An
    overflow would be a NonFiniteError.)"""
    process = reverse(EDM(), Denoiser(lambda x, t: 6 * torch.tanh(x), EDM(), prediction))
    ts = karras(EDM(), 10)
    x = EDM().prior(torch.randn(SHAPE, dtype=torch.float16), ts[0])
    for grad in (False, True):
        assert integrate(process, x, ts, solver, seed=1, grad=grad).x.abs().max() < 1000


@every_solver
def test_any_memory_layout_gives_the_same_numbers(solver):
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)

    def net(x, t):
        return torch.tanh(x)

    expected = run(net, "v", solver, x).x
    for layout in (x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT):
        torch.testing.assert_close(run(net, "v", solver, layout).x, expected, rtol=1e-13, atol=0)
    rows = run(net, "v", DPMpp2M(), x[:1].expand(2, 3, 4, 4)).x
    assert rows.shape == x.shape


@every_solver
def test_a_network_of_the_wrong_shape_is_told_what_to_return(solver):
    process = reverse(VP(), Denoiser(lambda x, t: x[:, :2], VP(), "v"))
    with pytest.raises(ShapeError, match=r"returned shape \(4, 2\) for x of shape \(4, 3\)"):
        integrate(process, start(), TS, solver, seed=1)


def test_a_network_sees_times_of_its_batch_in_the_dtype_of_x():
    seen = []

    def net(x, t):
        seen.append((tuple(t.shape), t.dtype, float(t[0])))
        return x

    process = reverse(VP(), Denoiser(net, VP(), "v"))
    sample(process, SHAPE, solver=DDIM(), grid=TS, seed=1, dtype=torch.float32)
    assert seen == [((4,), torch.float32, float(t.float())) for t in TS[:-1]]
