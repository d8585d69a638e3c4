"""Step by step, the states of diffusers' schedulers, written by others from the same papers.

Conventions. diffusers counts the steps of training, i = 0 ... 999, with alphas_cumprod[i]; step i
is time i + 1 here, so that time 0 is the data (alpha = 1, sigma = 0), where diffusers' last step
goes with `set_alpha_to_one` or `final_sigmas_type="zero"`. Its multistep solver then takes that
step at first order, as ours does; with `final_sigmas_type="sigma_min"` it ends at step 0, our time
1, and lowers the order of the last step of a run shorter than 15 unless `lower_order_final=False`.
Nothing is clipped. Its coefficients are float32, hence 1e-5 (of the largest component).
"""

import functools

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
)
from sdeflow_plugins.solvers.ddim import DDIM
from sdeflow_plugins.solvers.ddpm import DDPM
from sdeflow_plugins.solvers.dpmpp import DPMpp1S, DPMpp2M, DPMpp2S

from sdeflow import VP, Denoiser, GaussianSDE, ReverseSDE, trajectory
from sdeflow.grid import leading, linspace, trailing

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SHAPE = (3, 2, 4, 4)


class Discrete(GaussianSDE):
    """A user's SDE: the table of a scheduler, known at whole times alone."""

    t_min = 1.0

    def __init__(self, scheduler):
        kept = scheduler.alphas_cumprod.double()
        self.T = float(len(kept))
        self.squared = torch.cat((torch.ones(1, dtype=torch.float64), kept))

    def alpha(self, t):
        return self.squared[t.round().long()].sqrt()

    def sigma(self, t):
        return (1 - self.squared[t.round().long()]).sqrt()

    def time_of_log_snr(self, log_snr):
        times = torch.arange(self.T + 1, dtype=torch.float64)
        return times[(self.log_snr(times) - log_snr).abs().argmin()]


def network(sde, prediction):
    """What a network of that prediction says where D = tanh(x)."""

    def net(x, t):
        a, s = (v.float().reshape(-1, 1, 1, 1) for v in (sde.alpha(t), sde.sigma(t)))
        eps = (x - a * torch.tanh(x)) / s
        return eps if prediction == "noise" else a * eps - s * torch.tanh(x)

    return net


def states_of_theirs(scheduler, net, x, **options):
    """The state after each step of a scheduler; `options` are functions of the step's number."""
    states = []
    for k, i in enumerate(scheduler.timesteps):
        given = {name: value(k) for name, value in options.items()}
        x = scheduler.step(net(x, i[None] + 1), i, x, **given).prev_sample
        states.append(x)
    return torch.stack(states)


def states_of_ours(process, x, ts, solver, noise=None):
    kind = {"noise": noise} if noise else {"seed": 0}
    return torch.stack([state for _, state in trajectory(process, x, ts, solver, **kind)])


def assert_same_states(ours, theirs):
    assert ours.shape == theirs.shape
    scale = theirs.abs().amax(tuple(range(1, theirs.ndim)), keepdim=True)
    assert ((ours - theirs) / scale).abs().max() < 1e-5


def times(scheduler, end=0.0):
    return torch.cat((scheduler.timesteps.double() + 1, torch.tensor([end]).double()))


NAMES = {"noise": "epsilon", "v": "v_prediction"}
predictions = pytest.mark.parametrize("prediction", NAMES)


@predictions
@pytest.mark.parametrize("spacing", [leading, trailing])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_diffusers_ddim(prediction, spacing, eta):
    scheduler = DDIMScheduler(
        prediction_type=NAMES[prediction], timestep_spacing=spacing.__name__, clip_sample=False
    )
    scheduler.set_timesteps(20)
    sde = Discrete(scheduler)
    net, x, z = network(sde, prediction), torch.randn(SHAPE), torch.randn(20, *SHAPE)
    theirs = states_of_theirs(
        scheduler, net, x, eta=lambda k: eta, variance_noise=lambda k: z[k] if eta else None
    )
    draws = iter(z)
    process = ReverseSDE(sde, Denoiser(net, sde, prediction), eta)
    ours = states_of_ours(process, x, spacing(sde, 20), DDIM(), lambda t, s: next(draws))
    assert_same_states(ours, theirs)


@predictions
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("steps", [20, 1000])
def test_ddpm_is_diffusers_ddpm(prediction, variance, steps):
    """diffusers draws no noise for its last step; ours is multiplied by zero. Its 1 - alpha, in
    float32, would be off by 1e-3 near the data: its table is raised to float64."""
    scheduler = DDPMScheduler(
        prediction_type=NAMES[prediction], variance_type=f"fixed_{variance}", clip_sample=False
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(steps)
    sde = Discrete(scheduler)
    net, x = network(sde, prediction), torch.randn(SHAPE)
    generator, same = (torch.Generator().manual_seed(4) for _ in range(2))
    theirs = states_of_theirs(scheduler, net, x, generator=lambda k: generator)
    process, ts = ReverseSDE(sde, Denoiser(net, sde, prediction)), leading(sde, steps)
    noise = functools.partial(torch.randn, SHAPE, generator=same)
    ours = states_of_ours(process, x, ts, DDPM(variance), lambda t, s: noise())
    assert_same_states(ours, theirs)


@predictions
@pytest.mark.parametrize("eta", [0, 1])
@pytest.mark.parametrize(("order", "solver"), [(1, DPMpp1S()), (2, DPMpp2M())], ids=repr)
@pytest.mark.parametrize("end", [0.0, 1.0])
def test_dpmpp_2m_is_diffusers_multistep(prediction, eta, order, solver, end):
    """DPM-Solver++ (eta = 0) and SDE-DPM-Solver++ (eta = 1), of order 1 and 2."""
    scheduler = DPMSolverMultistepScheduler(
        prediction_type=NAMES[prediction],
        algorithm_type="sde-dpmsolver++" if eta else "dpmsolver++",
        solver_order=order,
        solver_type="midpoint",
        final_sigmas_type="sigma_min" if end else "zero",
        lower_order_final=False,
    )
    scheduler.set_timesteps(12)
    sde = Discrete(scheduler)
    net, x, z = network(sde, prediction), torch.randn(SHAPE), torch.randn(12, *SHAPE)
    theirs = states_of_theirs(scheduler, net, x, variance_noise=lambda k: z[k])
    draws = iter(z)
    process = ReverseSDE(sde, Denoiser(net, sde, prediction), eta)
    ours = states_of_ours(process, x, times(scheduler, end), solver, lambda t, s: next(draws))
    assert_same_states(ours, theirs)


def test_dpmpp_2s_is_diffusers_singlestep():
    """diffusers takes the middle of a step from its grid: the steps of training are made uniform
    in log-SNR, and every second of its states is one of ours."""
    kept = torch.sigmoid(torch.linspace(5, -5, 1001, dtype=torch.float64))
    before = torch.cat((torch.ones(1), kept[:-1]))
    scheduler = DPMSolverSinglestepScheduler(
        num_train_timesteps=1001,
        trained_betas=(1 - kept / before).numpy(),
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="sigma_min",
        lower_order_final=False,
    )
    scheduler.set_timesteps(10)
    sde = Discrete(scheduler)
    net, x = network(sde, "noise"), torch.randn(SHAPE)
    theirs = states_of_theirs(scheduler, net, x)[1::2]
    ts = times(scheduler, 1.0)[::2]
    process = ReverseSDE(sde, Denoiser(net, sde, "noise"), 0.0)
    ours = states_of_ours(process, x, ts, DPMpp2S())
    assert_same_states(ours, theirs)


@pytest.mark.parametrize("spacing", [leading, linspace, trailing])
@pytest.mark.parametrize("steps", [2, 7, 10, 20, 50, 1000])
def test_the_discrete_grids_are_diffusers(spacing, steps):
    """But for one step of linspace, for which diffusers takes the time next to the data."""
    scheduler = DDIMScheduler(timestep_spacing=spacing.__name__, clip_sample=False)
    scheduler.set_timesteps(steps)
    ours = spacing(VP(), steps) * 1000
    torch.testing.assert_close(ours, times(scheduler), rtol=0, atol=1e-9)


def test_the_comparison_rejects_a_wrong_eta():
    """The planted fault: eta taken for the variance."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(20)
    sde = Discrete(scheduler)
    net, x, z = network(sde, "noise"), torch.randn(SHAPE), torch.randn(20, *SHAPE)
    theirs = states_of_theirs(scheduler, net, x, eta=lambda k: 0.5, variance_noise=lambda k: z[k])
    draws = iter(z)
    process = ReverseSDE(sde, Denoiser(net, sde, "noise"), 0.5**0.5)
    ours = states_of_ours(process, x, leading(sde, 20), DDIM(), lambda t, s: next(draws))
    with pytest.raises(AssertionError):
        assert_same_states(ours, theirs)
