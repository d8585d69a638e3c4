"""Solvers are values, declare what they do, and refuse what they cannot integrate."""

import dataclasses
import math
import pickle
from dataclasses import dataclass

import pytest
import torch
from problems import label
from sdeflow_plugins.solvers.ddim import DDIM
from sdeflow_plugins.solvers.ddpm import DDPM
from sdeflow_plugins.solvers.dpmpp import DPMpp1S, DPMpp2M, DPMpp2S
from sdeflow_plugins.solvers.gddim import GDDIM

from sdeflow import (
    GBM,
    OU,
    SDE,
    SRK,
    VP,
    Denoiser,
    EulerHeun,
    EulerMaruyama,
    GaussianSDE,
    Heun,
    Milstein,
    PairingError,
    Platen,
    ReverseSDE,
    Solver,
    StepSolver,
    TorchDiffEq,
    TorchSDE,
    integrate,
    probability_flow,
    reverse,
)
from sdeflow.backends import ODE_METHODS, SDE_METHODS
from sdeflow.grid import log_snr, uniform
from sdeflow.solver import NEEDS

TS = log_snr(VP(), 8)
VALUES = (
    EulerMaruyama(),
    Milstein(),
    EulerHeun(),
    Heun(),
    SRK(),
    Platen(),
    DDIM(),
    DDPM(),
    DDPM("large"),
    DPMpp1S(),
    DPMpp2S(),
    DPMpp2M(),
    *map(TorchDiffEq, ODE_METHODS),
    *map(TorchSDE, SDE_METHODS),
)
every_solver = pytest.mark.parametrize("solver", VALUES, ids=label)


def never(x, t):
    raise AssertionError("the score was evaluated")


def start(*shape):
    return torch.randn(*(shape or (4, 3)), dtype=torch.float64)


class Coupled(GBM):
    """Matrix noise that looks at the state, and does not commute."""

    noise = "matrix"

    def diffusion(self, x, t):
        return torch.stack((x, x.flip(1)), -1)


# ---- values


@every_solver
def test_a_solver_is_a_value(solver):
    assert eval(repr(solver)) == solver
    assert pickle.loads(pickle.dumps(solver)) == solver
    assert hash(dataclasses.replace(solver)) == hash(solver)
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver.method = "other"


def test_different_solvers_are_different_values():
    assert len(set(VALUES)) == len(VALUES)


@every_solver
def test_a_run_leaves_nothing_in_its_solver(solver):
    eta = 0.0 if "ode" in solver.needs else 1.0
    before = dict(vars(solver))
    ts = uniform(VP(), 4, t_min=0.1)
    runs = [integrate(ReverseSDE(VP(), lambda x, t: -x, eta), start(), ts, solver, seed=1)]
    assert vars(solver) == before
    again = integrate(ReverseSDE(VP(), lambda x, t: -x, eta), start(), ts, solver, seed=1)
    assert again.nfe == runs[0].nfe


# ---- declarations


@every_solver
@pytest.mark.parametrize("fused", [True, False])
def test_a_solver_makes_the_evaluations_it_declares(solver, fused):
    """On an additive reverse SDE, or the flow, as it needs; some multistep methods begin dearer."""
    calls = 0

    def score(x, t):
        nonlocal calls
        calls += 1
        return -x

    process = ReverseSDE(VP(), score, 0.0 if "ode" in solver.needs else 1.0)
    ts = uniform(VP(), 20, t_min=0.1)
    solution = integrate(process, start(), ts, solver, seed=1, grad=not fused)
    assert solution.nfe == calls
    if not math.isnan(solver.evaluations):
        beginning = {"explicit_adams": 6, "reversible_heun": 1}
        extra = beginning.get(getattr(solver, "method", ""), 0)
        assert calls == 20 * solver.evaluations + extra


def test_every_need_has_a_remedy_and_a_solver_or_is_offered_to_plugins():
    used = {need for solver in (*VALUES, GDDIM()) for need in solver.needs}
    assert used | {"reverse", "additive"} == NEEDS.keys()


# ---- refusals


@dataclass(frozen=True)
class Needy(DDIM):
    """A solver that needs one thing."""

    need: str = "reverse"

    @property
    def needs(self):
        return (self.need,)


class Spectrum(GaussianSDE):
    """An elementwise schedule: every component fades at a rate of its own."""

    def alpha(self, t):
        return torch.exp(-t[..., None] * torch.arange(1, 4).double())

    def sigma(self, t):
        return torch.sqrt(1 - self.alpha(t) ** 2)


REFUSED = {
    # need         process, and what the message says
    "reverse": (OU(), "is no reverse process; wrap it: reverse"),
    "gaussian": (reverse(GBM(), never), "does not reverse a GaussianSDE"),
    "system": (reverse(VP(), never), r"does not reverse a LinearSystem .*DDIM\(\)"),
    "one alpha": (reverse(Spectrum(), never), r"elementwise schedules.*use DPMpp2M\(\) or DDIM"),
    "ode": (reverse(VP(), never), "is not deterministic; use probability_flow"),
    "eta=1": (ReverseSDE(VP(), never, 0.5), r"does not have eta = 1; .*DDIM\(\)"),
    "additive": (reverse(GBM(), never), "noise that may depend on the state; use EulerMaruyama"),
    "commutative": (Coupled(), r"not known to commute; use EulerMaruyama\(\) or EulerHeun\(\)"),
    "diagonal": (Coupled(), r"matrix noise that may depend on the state; use Milstein\(\)"),
    "noise": (probability_flow(VP(), never), r"is deterministic; .*Heun\(\)"),
}


def test_every_need_is_tried():
    assert REFUSED.keys() == NEEDS.keys()


@pytest.mark.parametrize("need", REFUSED)
def test_an_unmet_need_is_refused_before_the_first_evaluation(need):
    process, message = REFUSED[need]
    with pytest.raises(PairingError, match=f"Needy cannot integrate this .*{message}"):
        integrate(process, start(), TS, Needy(need))


PAIRINGS = [
    # solver, a process that it refuses, the remedy
    (DDIM(), OU(), "EulerMaruyama"),
    (DDIM(), reverse(GBM(), never), "EulerMaruyama"),
    (DDPM(), probability_flow(VP(), never), "DDIM"),
    (DDPM(), ReverseSDE(VP(), never, 0.3), "DDIM"),
    (DPMpp1S(), GBM(), "EulerMaruyama"),
    (DPMpp2S(), GBM(), "EulerMaruyama"),
    (DPMpp2M(), reverse(GBM(), never), "EulerMaruyama"),
    (Milstein(), Coupled(), "commutative = True"),
    (Milstein(), reverse(Coupled(), never), "EulerHeun"),
    (SRK(), Coupled(), "additive = True"),
    (SRK(), reverse(Coupled(), never), "EulerHeun"),
    (TorchDiffEq(), reverse(VP(), never), "probability_flow"),
    (TorchDiffEq("rk4"), OU(), "probability_flow"),
    (TorchSDE(), probability_flow(VP(), never), "ODE solver"),
    (TorchSDE("milstein"), Coupled(), "TorchSDE('heun')"),
    (TorchSDE("srk"), reverse(Coupled(), never), "TorchSDE('euler')"),
]


@pytest.mark.parametrize(("solver", "process", "remedy"), PAIRINGS, ids=label)
def test_a_wrong_pairing_is_refused_with_a_remedy(solver, process, remedy):
    ts = TS if process.direction < 1 else TS.flip(0)
    with pytest.raises(PairingError, match=type(solver).__name__ + "|torchsde") as caught:
        integrate(process, start(), ts, solver)
    assert remedy in str(caught.value)


def test_heun_takes_the_probability_flow_of_any_sde():
    """Where no noise enters, Ito and Stratonovich are one."""
    x = integrate(probability_flow(GBM(), lambda x, t: -x), 1 + start().abs(), TS, Heun()).x
    assert x.isfinite().all()


@pytest.mark.parametrize("process", [never, None, "vp", VP], ids=label)
def test_a_process_that_is_no_sde_is_refused(process):
    with pytest.raises(PairingError, match=r"must be an SDE: reverse\(sde, score\)"):
        integrate(process, start(), TS, EulerMaruyama())


# ---- solvers of one's own


@dataclass(frozen=True)
class Midpoint(StepSolver):
    """A one-step solver in ten lines."""

    order = 2
    evaluations = 2
    needs = ("ode",)

    def step(self, process, x, t, s, noise, memory):
        middle = x + (s - t) / 2 * process.drift(x, t)
        return x + (s - t) * process.drift(middle, (t + s) / 2), None


@dataclass(frozen=True)
class AdamsBashforth2(StepSolver):
    """A multistep solver in twenty."""

    order = 2
    needs = ("ode",)

    def step(self, process, x, t, s, noise, memory):
        h, slope = s - t, process.drift(x, t)
        if memory is None:
            return x + h * slope, (slope, h)
        before, h_before = memory
        return x + h * (slope + h / (2 * h_before) * (slope - before)), (slope, h)


@dataclass(frozen=True)
class Wholesale(Solver):
    """A solver that owns its loop."""

    order = 1

    def solve(self, process, x, ts, noise):
        for t, s in zip(ts[:-1], ts[1:], strict=True):
            x = x + (s - t) * process.drift(x, t)
            yield s, x


@pytest.mark.parametrize(
    ("own", "ours"),
    [(Midpoint(), TorchDiffEq("midpoint")), (Wholesale(), EulerMaruyama())],
    ids=label,
)
def test_a_solver_of_ones_own_is_the_library_s(own, ours):
    process = probability_flow(VP(), Denoiser(lambda x, t: torch.tanh(x), VP(), "v"))
    x = start()
    mine, theirs = (integrate(process, x, TS, solver) for solver in (own, ours))
    assert mine.fused == isinstance(own, StepSolver)
    torch.testing.assert_close(mine.x, theirs.x, rtol=1e-11, atol=1e-11)


def test_a_multistep_solver_of_ones_own_has_its_order():
    from sdeflow.testing import order, strong_errors

    def grid(sde, n):
        return uniform(sde, n, t_max=0.6, t_min=0.1)

    steps = [160, 320]
    errors = strong_errors(AdamsBashforth2(), VP(), steps, grid)
    assert order(errors, steps) == pytest.approx(2, abs=0.05)


def test_the_plain_loop_is_the_step_repeated():
    process, x = reverse(VP(), lambda x, t: -x), start()
    z = torch.randn(8, 4, 3, dtype=torch.float64)
    draws = iter(z)
    solution = integrate(process, x, TS, DDIM(), noise=lambda t, s: next(draws), keep=True)
    memory = None
    for k in range(8):
        x, memory = DDIM().step(process, x, TS[k], TS[k + 1], lambda t, s, k=k: z[k], memory)
        torch.testing.assert_close(solution.path[k + 1], x, rtol=1e-12, atol=1e-12)


def test_a_process_of_ones_own_runs_by_drift_and_diffusion_alone():
    class Decay(SDE):
        direction = 0

        def drift(self, x, t):
            return -x

        def diffusion(self, x, t):
            return torch.zeros_like(x)

    ts = torch.linspace(0, 1, 201, dtype=torch.float64)
    for solver, error in ((EulerMaruyama(), 1e-2), (Heun(), 1e-4), (TorchDiffEq("rk4"), 1e-9)):
        x = integrate(Decay(), torch.ones(1, 1).double(), ts, solver).x
        assert float(x) == pytest.approx(math.exp(-1), abs=error)
