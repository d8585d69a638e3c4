"""The drivers: trajectory, integrate, sample, encode, and the Solution they return."""

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from sdeflow_plugins.solvers.ddim import DDIM
from sdeflow_plugins.solvers.dpmpp import DPMpp2M, DPMpp2S
from torch.multiprocessing.reductions import StorageWeakRef

from sdeflow import (
    EDM,
    OU,
    VP,
    Denoiser,
    EulerMaruyama,
    GridError,
    Heun,
    NonFiniteError,
    PairingError,
    RectifiedFlow,
    TorchDiffEq,
    TorchSDE,
    catalogue,
    encode,
    get,
    integrate,
    probability_flow,
    reverse,
    sample,
    trajectory,
)
from sdeflow.grid import GRIDS, karras, log_snr

DOUBLE = {"dtype": torch.float64}
TS = log_snr(VP(), 8)
ROADS = (DDIM(), DPMpp2M(), DPMpp2S(), EulerMaruyama(), Heun(), TorchSDE("srk"))
every_road = pytest.mark.parametrize("solver", ROADS, ids=repr)


def net(x, t):
    return torch.tanh(x)


def noisy(net=net):
    return reverse(VP(), Denoiser(net, VP(), "v"))


def flow(net=net):
    return probability_flow(VP(), Denoiser(net, VP(), "v"))


# ---- names and objects


@pytest.mark.parametrize("name", catalogue("solver"))
def test_every_registered_solver_samples_by_name(name):
    solver = get("solver", name)
    if "system" in solver.needs:
        pytest.skip("for a LinearSystem: see test_gddim.py")
    process = flow() if "ode" in solver.needs else noisy()
    steps = 40 if "implicit" in name else 6  # whose iteration converges for short steps alone
    made = sample(process, (2, 3), solver=name, steps=steps, grid="uniform", seed=1, **DOUBLE)
    again = sample(process, (2, 3), solver=solver, steps=steps, grid="uniform", seed=1, **DOUBLE)
    assert torch.equal(made.x, again.x)
    assert made.x.isfinite().all()


@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_is_a_name_a_function_or_its_times(name):
    times = GRIDS[name](VP(), 6)
    for grid in (name, GRIDS[name], times, times.tolist(), times.numpy()):
        solution = sample(noisy(), (2, 3), solver=DDIM(), grid=grid, steps=6, seed=1)
        assert torch.equal(solution.ts, times)
    bound = sample(noisy(), (2, 3), grid=lambda sde, n: karras(sde, n, rho=3), steps=4, seed=1)
    assert torch.equal(bound.ts, karras(VP(), 4, rho=3))


# ---- seeds


@every_road
def test_a_seed_is_a_sample(solver):
    one, again, other = (
        sample(noisy(), (4, 3), solver=solver, steps=4, seed=seed).x for seed in (5, 5, 6)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@every_road
def test_a_solution_tells_the_seed_that_reproduces_it(solver):
    drawn = sample(noisy(), (4, 3), solver=solver, steps=4)
    assert torch.equal(drawn.x, sample(noisy(), (4, 3), solver=solver, steps=4, seed=drawn.seed).x)
    x = torch.randn(4, 3)
    drawn = integrate(noisy(), x, TS, solver)
    assert torch.equal(drawn.x, integrate(noisy(), x, TS, solver, seed=drawn.seed).x)


@every_road
def test_no_global_generator_is_read_or_moved(solver):
    def states():
        return (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate())

    before = states()
    first = sample(noisy(), (4, 3), solver=solver, steps=3).x
    assert states() == before
    assert not torch.equal(first, sample(noisy(), (4, 3), solver=solver, steps=3).x)


def test_noise_may_be_given_instead_of_a_seed():
    z = torch.randn(8, 4, 3, **DOUBLE)
    draws, asked = iter(z), []

    def noise(t, s):
        asked.append((float(t), float(s)))
        return next(draws)

    solution = integrate(noisy(), torch.randn(4, 3, **DOUBLE), TS, DDIM(), noise=noise)
    assert solution.seed is None
    assert asked == list(zip(TS[:-1].tolist(), TS[1:].tolist(), strict=True))


# ---- what comes out


@every_road
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 3, 2), (5, 3, 2, 2), (0, 3)])
def test_samples_have_the_shape_and_dtype_asked_for(solver, dtype, shape):
    solution = sample(noisy(), shape, solver=solver, steps=5, seed=1, dtype=dtype, keep=True)
    assert solution.x.shape == shape and solution.x.dtype == dtype
    assert solution.path.shape == (6, *shape) and solution.path.dtype == dtype
    assert torch.equal(solution.path[-1], solution.x)
    assert not solution.x.requires_grad


@every_road
def test_lower_precision_is_the_same_sample_to_rounding(solver):
    x, z = torch.randn(6, 3, **DOUBLE), torch.randn(16, 6, 3, **DOUBLE)

    def run(dtype):
        draws = iter(z.to(dtype))
        ts = log_snr(VP(), 5)
        return integrate(noisy(), x.to(dtype), ts, solver, noise=lambda t, s: next(draws)).x

    exact = run(torch.float64)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        error = (run(dtype).double() - exact).abs().max()
        assert error < 30 * torch.finfo(dtype).eps * exact.abs().max()


@every_road
def test_a_trajectory_an_integral_and_its_path_agree(solver):
    x = torch.randn(4, 3, **DOUBLE)
    solution = integrate(noisy(), x, TS, solver, seed=1, keep=True)
    stepped = list(trajectory(noisy(), x, TS, solver, seed=1))
    assert [float(t) for t, _ in stepped] == TS[1:].tolist()
    assert torch.equal(torch.stack([x, *(state for _, state in stepped)]), solution.path)
    assert torch.equal(integrate(noisy(), x, TS, solver, seed=1).x, solution.x)


def test_a_solution_knows_its_grid_its_evaluations_and_its_road():
    solution = sample(noisy(), (2, 3), solver="dpmpp_2s", steps=6, seed=3)
    assert (len(solution.ts), solution.nfe, solution.seed, solution.fused) == (7, 12, 3, True)
    assert solution.path is None
    assert repr(solution) == (
        "Solution(x=(2, 3) torch.float32, steps=6, nfe=12, seed=3, fused=True)"
    )


@every_road
@pytest.mark.parametrize("keep", [False, True])
def test_progress_counts_the_steps(solver, keep, capsys):
    quiet = integrate(noisy(), torch.ones(2, 3), TS, solver, seed=1, keep=keep)
    assert capsys.readouterr().err == ""
    loud = integrate(noisy(), torch.ones(2, 3), TS, solver, seed=1, keep=keep, progress=True)
    assert "8/8" in capsys.readouterr().err
    assert torch.equal(quiet.x, loud.x)


@every_road
@pytest.mark.parametrize("fuse", [True, False])
def test_no_old_state_is_kept(solver, fuse):
    """A run of any length holds a few states: those of its memory and of the step at hand."""
    seen, alive = [], []

    def watching(x, t):
        seen.append(StorageWeakRef(x.untyped_storage()))
        alive.append(len({ref.cdata for ref in seen if not ref.expired()}))
        return net(x, t)

    with torch.no_grad():
        integrate(noisy(watching), torch.ones(2, 3), log_snr(VP(), 40), solver, grad=not fuse)
    assert len(seen) >= 40
    assert max(alive) <= 6


def test_samples_of_the_prior_have_its_scale():
    """A grid that begins below T begins with the noise of its own first time."""
    wide = sample(flow(), (20_000, 1), solver=DDIM(), grid=TS[[0, 8]], seed=1, keep=True).path[0]
    assert float(wide.std()) == pytest.approx(float(VP().sigma(TS[0])), rel=0.03)
    process = probability_flow(EDM(), Denoiser(net, EDM(), "edm"))
    ts = torch.tensor([10.0, 1.0])
    begun = sample(process, (20_000, 1), solver=DDIM(), grid=ts, seed=1, keep=True).path[0]
    assert float(begun.std()) == pytest.approx(10.0, rel=0.03)


# ---- gradients


@every_road
def test_gradients_through_a_run_are_those_of_finite_differences(solver):
    ts = log_snr(VP(), 4, t_max=0.6, t_min=0.05)
    gain = torch.tensor(0.7, **DOUBLE, requires_grad=True)
    x = torch.randn(2, 2, **DOUBLE, requires_grad=True)

    def end(x, gain):
        process = noisy(lambda x, t: torch.tanh(gain * x))
        return integrate(process, x, ts, solver, seed=1, grad=True).x

    assert torch.autograd.gradcheck(end, (x, gain))


@every_road
def test_without_grad_no_graph_is_made(solver):
    x = torch.ones(2, 3, requires_grad=True)
    seen = []

    def watching(x, t):
        seen.append(torch.is_grad_enabled())
        return torch.tanh(x)

    assert not integrate(noisy(watching), x, TS, solver, seed=1).x.requires_grad
    for _, state in trajectory(noisy(watching), x, TS, solver, seed=1):
        assert not state.requires_grad
    assert not any(seen)


@every_road
def test_the_caller_s_loop_keeps_its_own_grad_mode(solver):
    for _ in trajectory(noisy(), torch.ones(2, 3), TS, solver, seed=1):
        assert torch.is_grad_enabled()
    for _ in trajectory(noisy(), torch.ones(2, 3), TS, solver, seed=1):
        break
    assert torch.is_grad_enabled()
    with torch.inference_mode():
        states = [x for _, x in trajectory(noisy(), torch.ones(2, 3), TS, solver, seed=1)]
    assert len(states) == 8 and torch.is_grad_enabled()


# ---- up and down


@pytest.mark.parametrize(
    ("solver", "order"),
    [(DDIM(), 1), (EulerMaruyama(), 1), (Heun(), 2), (DPMpp2S(), 2), (TorchDiffEq("rk4"), 4)],
    ids=repr,
)
def test_the_round_trip_error_falls_with_the_order(solver, order):
    x0, errors = torch.randn(16, 2, **DOUBLE), []
    for steps in (20, 40):
        ts = log_snr(VP(), steps, t_max=0.6, t_min=0.05)
        there = encode(flow(), x0, solver=solver, grid=ts)
        assert torch.equal(there.ts, ts.flip(0))
        errors.append(float((integrate(flow(), there.x, ts, solver).x - x0).abs().max()))
    assert errors[0] / errors[1] > 0.8 * 2**order


def test_encoding_then_sampling_is_the_data_to_the_tolerance():
    x0 = torch.randn(16, 2, **DOUBLE)
    solver = TorchDiffEq("dopri5", 1e-9, 1e-9)
    code = encode(flow(), x0, solver=solver, keep=True)
    assert torch.equal(code.path[0], x0)
    assert (integrate(flow(), code.x, code.ts.flip(0), solver).x - x0).abs().max() < 1e-6


def test_a_forward_sde_runs_up_in_time():
    ts, one = TS.flip(0), torch.ones(2, 1, **DOUBLE)
    silent = integrate(OU(), one, ts, EulerMaruyama(), noise=lambda t, s: 0 * one)
    torch.testing.assert_close(silent.x[0, 0], (1 - ts.diff()).prod(), rtol=1e-12, atol=0)
    assert silent.nfe == 8


# ---- many at once


@every_road
def test_two_interleaved_trajectories_are_as_alone(solver):
    process, other = noisy(), reverse(RectifiedFlow(), Denoiser(net, RectifiedFlow(), "velocity"))
    ts = log_snr(RectifiedFlow(), 8, t_max=0.9)
    x = torch.randn(4, 3, **DOUBLE)
    alone = [integrate(p, x, g, solver, seed=1).x for p, g in ((process, TS), (other, ts))]
    pairs = zip(
        trajectory(process, x, TS, solver, seed=1),
        trajectory(other, x, ts, solver, seed=1),
        strict=True,
    )
    *_, ((_, first), (_, second)) = pairs
    assert torch.equal(first, alone[0]) and torch.equal(second, alone[1])


@every_road
def test_eight_threads_with_one_solver_are_as_alone(solver):
    process = noisy()

    def run(seed):
        return sample(process, (4, 3), solver=solver, steps=5 + seed % 4, seed=seed).x

    alone = [run(seed) for seed in range(24)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(run, range(24)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


# ---- encode and sample refuse what they cannot do


def test_encode_takes_only_the_probability_flow():
    for process in (noisy(), OU()):
        with pytest.raises(PairingError, match=r"give it probability_flow\(sde, score\)"):
            encode(process, torch.ones(2, 3))


def test_encode_needs_a_grid_that_ends_above_zero():
    with pytest.raises(GridError, match=r"reaches t = 0, where sigma = 0; .* t_min > 0"):
        encode(flow(), torch.ones(2, 3), grid="trailing")


def test_sample_takes_only_a_reverse_process():
    with pytest.raises(PairingError, match=r"must be a reverse process: reverse\(sde, score\)"):
        sample(OU(), (2, 3))


def test_the_step_of_a_nan_is_named_on_an_ode_even_with_noise_given():
    broken = flow(lambda x, t: net(x, t) * (torch.nan if t[0] < (TS[2] + TS[3]) / 2 else 1))
    with pytest.raises(NonFiniteError, match="at step 4 of 8"):
        integrate(broken, torch.ones(2, 3), TS, DDIM(), noise=lambda t, s: torch.ones(2, 3))
