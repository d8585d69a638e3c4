"""Step by step, the states of more of diffusers' schedulers, on their own levels, in float64.

A scheduler is a table of levels sigma_0 > sigma_1 > ... and a rule for a step. The table is made
ours: an SDE known at whole times, from the first level at T = N to the last at 0. Where a table is
float32 it is raised to float64 in place, so that what is compared is the rule: 1e-6 of the largest
component, and where nothing is float32 inside, 1e-9.
"""

import math

import diffusers
import pytest
import torch
from sdeflow_plugins.solvers.dpm_solver import DPMSolver
from sdeflow_plugins.solvers.dpmpp import DPMpp2S, DPMpp3M
from sdeflow_plugins.solvers.multistep import Multistep, Value
from sdeflow_plugins.solvers.pndm import PNDM

from sdeflow import Denoiser, GaussianSDE, ReverseSDE, get, trajectory

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers"),
]
SHAPE, DOUBLE = (3, 2, 4), torch.float64


class Table(GaussianSDE):
    """Levels sigma/alpha at whole times: VP (alpha^2 + sigma^2 = 1) or VE (alpha = 1)."""

    t_min = 0.0

    def __init__(self, levels, vp=True):
        self.levels, self.vp, self.T = levels.double().flip(0), vp, float(len(levels) - 1)

    def level(self, t):
        return self.levels[t.round().long()]

    def alpha(self, t):
        rho = self.level(t)
        return 1 / (1 + rho**2).sqrt() if self.vp else torch.ones_like(rho)

    def sigma(self, t):
        return self.level(t) * self.alpha(t)

    def time_of_log_snr(self, log_snr):
        return (self.levels.log() + log_snr / 2).abs().argmin().double()

    @property
    def ts(self):
        return torch.arange(self.T, -1, -1, dtype=DOUBLE)


def noise_net(sde):
    """A noise prediction where D = tanh(x)."""

    def net(x, t):
        t = t.reshape(-1)[0]
        a, s = sde.alpha(t), sde.sigma(t)
        return (x - a * torch.tanh(x)) / s

    return net


def theirs(scheduler, sde, x, scaled=False, **options):
    """The state after each of a scheduler's steps, asked for the noise at the level it is at."""
    net, states = noise_net(sde), []
    for k, i in enumerate(scheduler.timesteps):
        at = torch.tensor([sde.T - k], dtype=DOUBLE)
        if scaled:  # k-diffusion's kind: the state is VE, and the network was trained on VE here
            out = net(scheduler.scale_model_input(x, i) * (1 + sde.level(at) ** 2).sqrt(), at)
        else:
            out = net(x, at)
        x = scheduler.step(out, i, x, **{name: f(k) for name, f in options.items()}).prev_sample
        states.append(x)
    return torch.stack(states)


def ours(sde, x, ts, solver, eta=0.0, noise=None):
    process = ReverseSDE(sde, Denoiser(noise_net(sde), sde, "noise"), eta)
    given = {"noise": noise} if noise else {"seed": 0}
    return torch.stack([x for _, x in trajectory(process, x, ts, solver, **given)])


def assert_same(a, b, rtol=1e-6):
    scale = b.abs().amax(tuple(range(1, b.ndim)), keepdim=True)
    assert a.shape == b.shape
    assert ((a - b) / scale).abs().max() < rtol


def start():
    return torch.randn(SHAPE, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))


def prepared(name, steps, **options):
    """A scheduler with float64 levels, and the SDE of its levels."""
    scheduler = getattr(diffusers, f"{name}Scheduler")(**options)
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    return scheduler


END = {"final_sigmas_type": "sigma_min", "lower_order_final": False}


@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver_multistep(order):
    """On the noise, at orders 1 and 2; theirs of order 3 is published with half a D''."""
    options = {"algorithm_type": "dpmsolver", "solver_type": "heun", "solver_order": order, **END}
    with pytest.warns(FutureWarning, match="dpmsolver.* is deprecated"):
        scheduler = prepared("DPMSolverMultistep", 10, **options)
    sde, x = Table(scheduler.sigmas), start()
    made = ours(sde, x, sde.ts, Multistep("noise", "log_snr", order, last="full"))
    given = theirs(scheduler, sde, x)
    if order < 3:
        assert_same(made, given)
    else:
        assert_same(made[:2], given[:2])
        assert (made[2] - given[2]).abs().max() > 1e-5


@pytest.mark.parametrize("final", ["sigma_min", "zero"])
def test_published_3m_is_diffusers_order_3_and_the_corrected_is_not(final):
    options = {"solver_order": 3, "lower_order_final": False, "final_sigmas_type": final}
    scheduler = prepared("DPMSolverMultistep", 10, **options)
    sde, x = Table(scheduler.sigmas), start()
    given = theirs(scheduler, sde, x)
    assert_same(ours(sde, x, sde.ts, DPMpp3M(published=True)), given, 1e-5)
    with pytest.raises(AssertionError):
        assert_same(ours(sde, x, sde.ts, DPMpp3M()), given, 1e-3)


@pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++"])
def test_dpm_solver_singlestep(algorithm):
    """Their middle is on the grid: levels uniform in log sigma, every second one ours. (Their third
    order mixes two formulas in its stages, and is neither the paper's nor ours.)"""
    options = {"algorithm_type": algorithm, "solver_order": 2, **END}
    if algorithm == "dpmsolver":
        with pytest.warns(FutureWarning, match="dpmsolver.* is deprecated"):
            scheduler = diffusers.DPMSolverSinglestepScheduler(**options)
    else:
        scheduler = diffusers.DPMSolverSinglestepScheduler(**options)
    scheduler.set_timesteps(8)
    scheduler.sigmas = torch.linspace(math.log(50), math.log(0.05), 9, dtype=DOUBLE).exp()
    sde, x = Table(scheduler.sigmas), start()
    solver = DPMSolver(2) if algorithm == "dpmsolver" else DPMpp2S()
    given = theirs(scheduler, sde, x)[1::2]
    assert_same(ours(sde, x, sde.ts[::2], solver), given, 1e-5)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_is_the_noise_in_log_sigma(order):
    """What diffusers calls DEIS is a polynomial in log(sigma/alpha): our eab_noise."""
    scheduler = prepared("DEISMultistep", 10, solver_order=order, lower_order_final=False)
    scheduler.sigmas[-1] = scheduler.sigmas[-2] / 2  # theirs ends at 0, where its log is not finite
    sde, x = Table(scheduler.sigmas), start()
    made = ours(sde, x, sde.ts, Multistep("noise", "log_snr", order, last="full"))
    assert_same(made, theirs(scheduler, sde, x))


def steps_from_their_history(scheduler, solver, eta=0.0, rtol=1e-6):
    """Each step of `solver` begun from what the scheduler has seen, compared with its own.

    Both set a weight by hand where two values are in use, at the start: so a whole run differs.
    """
    sde, x, compared = Table(scheduler.sigmas), start(), 0
    net, ts, begun = noise_net(sde), sde.ts, solver.points
    process = ReverseSDE(sde, Denoiser(net, sde, "noise"), eta)
    same, again = (torch.Generator().manual_seed(7) for _ in range(2))
    z = [torch.randn(SHAPE, dtype=DOUBLE, generator=same) for _ in ts]
    given = {"generator": again} if eta else {}
    history = []  # predicted states
    for k, i in enumerate(scheduler.timesteps):
        predicted = x
        x = scheduler.step(net(x, ts[k]), i, x, **given).prev_sample
        history.append(predicted)
        if k <= begun:
            continue
        memory = (), None, 99
        for y, t, u in zip(
            history[k - begun :], ts[k - begun :], ts[k - begun + 1 :], strict=False
        ):
            # D at the predicted states, and the weights of the last step: its state is not used.
            if t > ts[k]:
                _, memory = solver.step(process, y, t, u, lambda t, s: z[0], (memory[0], None, 99))
        made, _ = solver.step(process, predicted, ts[k], ts[k + 1], lambda t, s: z[k], memory)  # noqa: B023
        assert_same(made[None], x[None], rtol)
        compared += 1
    assert compared == len(ts) - 2 - begun


@pytest.mark.parametrize("kind", ["bh1", "bh2"])
def test_every_step_of_unipc(kind):
    """Whichever B(h): it cancels from what is solved for, at three values."""
    options = {"solver_order": 3, "solver_type": kind, **END}
    scheduler = prepared("UniPCMultistep", 10, **options)
    steps_from_their_history(scheduler, Multistep("data", "log_snr", 3, corrector=4, last="full"))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("last", ["full", "lower"])
def test_a_whole_run_of_unipc(order, last):
    """With bh2 the weights set by hand, those of two values, take their line at the middle."""
    lower = {"lower_order_final": last == "lower"}
    scheduler = prepared("UniPCMultistep", 10, solver_order=order, **(END | lower))
    sde, x = Table(scheduler.sigmas), start()
    solver = get("solver", f"unipc_{order}", last=last)
    assert_same(ours(sde, x, sde.ts, solver), theirs(scheduler, sde, x))


def test_lms_is_diffusers_on_the_same_levels():
    """Their integrals are scipy's, to 1e-4 relative."""
    scheduler = prepared("LMSDiscrete", 10)
    scheduler.sigmas[-1] = 0.02
    sde, x = Table(scheduler.sigmas, vp=False), 10 * start()
    given = theirs(scheduler, sde, x, scaled=True)
    made = ours(sde, x, sde.ts, get("solver", "lms", last="full"))
    assert_same(made, given, 1e-4)


@pytest.mark.parametrize("solver", ["edm_heun", "ddim"])
def test_heun_and_euler_in_sigma(solver):
    """Two of their steps of Heun are one of ours, and the last is Euler's."""
    scheduler = prepared("HeunDiscrete" if solver == "edm_heun" else "EulerDiscrete", 8)
    levels = scheduler.sigmas.unique().flip(0)
    sde, x = Table(levels, vp=False), 10 * start()
    net, states = noise_net(sde), []
    for k, i in enumerate(scheduler.timesteps):
        rho = scheduler.sigmas[k]
        at = (levels.flip(0) - rho).abs().argmin().double()
        x_in = scheduler.scale_model_input(x, i) * (1 + rho**2).sqrt()
        x = scheduler.step(net(x_in, at), i, x).prev_sample
        states.append(x)
    given = torch.stack(states)
    if solver == "edm_heun":
        given = torch.cat((given[1::2], given[-1:]))
    assert_same(ours(sde, 10 * start(), sde.ts, get("solver", solver)), given)


def test_dpm_solver_2_is_diffusers_kdpm2():
    """Their middle is in log sigma, on the grid with every second level ours."""
    scheduler = prepared("KDPM2Discrete", 8)
    first, inner = scheduler.sigmas, scheduler.sigmas_interpol.double()
    nodes = torch.cat((first[:1], first[2::2]))[:8]
    middles = (nodes.log()[:-1] + nodes.log()[1:]).div(2).exp()
    sde = Table(torch.stack((nodes, torch.cat((middles, nodes[-1:] / 2))), 1).flatten()[:-1], False)
    net, x, states = noise_net(sde), 10 * start(), []
    for k, i in enumerate(scheduler.timesteps[:14]):
        rho = (first if k % 2 == 0 else inner)[k]
        at = (sde.levels - rho).abs().argmin().double()
        assert float(sde.level(at)) == pytest.approx(float(rho), rel=1e-5)
        x_in = scheduler.scale_model_input(x, i) * (1 + rho**2).sqrt()
        x = scheduler.step(net(x_in, at), i, x).prev_sample
        states.append(x)
    made = ours(sde, 10 * start(), sde.ts[::2], DPMSolver(2))
    assert_same(made, torch.stack(states)[1::2], 1e-5)


def test_plms_is_diffusers_pndm_after_its_start():
    """diffusers begins by a step of its own; from its history the weights are ours. Its levels are
    the training steps', its transfer formula DDIM's written in another way."""
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(10)
    visited = [*scheduler.timesteps.tolist(), scheduler.timesteps[-1].item() - 100]
    kept = torch.stack([scheduler.alphas_cumprod[max(i, 0)] for i in visited])
    levels = ((1 - kept) / kept).sqrt()
    sde, x, states = Table(levels.unique().flip(0)), start(), [start()]
    net = noise_net(sde)
    times = [(sde.levels - level).abs().argmin().double() for level in levels]
    for k, i in enumerate(scheduler.timesteps):
        x = scheduler.step(net(x, times[k]), i, x).prev_sample
        states.append(x)
    process = ReverseSDE(sde, Denoiser(net, sde, "noise"), 0.0)
    for k in range(5, len(scheduler.timesteps)):
        past = tuple(Value(levels[j], net(states[j], times[j])) for j in (k - 1, k - 2, k - 3))
        memory = past, len(levels) - k - 1
        made, _ = PNDM(4).step(process, states[k], times[k], times[k + 1], None, memory)
        assert_same(made[None], states[k + 1][None])


@pytest.mark.parametrize("points", [1, 2, 3, 4])
def test_ipndm_weights_are_those_of_equal_steps(points):
    """On equal steps in rho they are the exact Adams integrals, that is deis_rhoab's."""
    sde = Table(torch.linspace(5, 1, 9, dtype=DOUBLE))
    exact = Multistep("noise", "rho", points, last="full")
    assert_same(ours(sde, start(), sde.ts, PNDM(points)), ours(sde, start(), sde.ts, exact), 1e-12)


@pytest.mark.parametrize(("predictor", "corrector"), [(3, 3), (3, 4)])
def test_every_step_of_sa_solver(predictor, corrector):
    """With noise in every step, tau = 1; their corrector takes the same noise again, as ours."""
    scheduler = prepared(
        "SASolver",
        9,
        predictor_order=predictor,
        corrector_order=corrector,
        tau_func=lambda t: 1.0,
        lower_order_final=False,
    )
    solver = get("solver", "sa_solver", predictor=predictor, corrector=corrector, last="full")
    steps_from_their_history(scheduler, solver, 1.0, 1e-5)
