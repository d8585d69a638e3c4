"""Measured strong orders: within 0.1 of what each solver declares, on problems solved exactly.

Eight problems of `sdeflow.testing.KNOWN`, 20,000 paths each, steps 2^-4 to 2^-8 on the same
Brownian paths, in float64. The error is E|x_1 - X_1|, of the whole state; the order is the slope of
a straight line through the five (log dt, log error).
"""

from dataclasses import dataclass

import pytest
import torch

from sdeflow import (
    SDE,
    BrownianPath,
    EulerHeun,
    EulerMaruyama,
    Heun,
    Milstein,
    PairingError,
    catalogue,
    get,
    integrate,
)
from sdeflow.noise import area
from sdeflow.runge_kutta import SRK
from sdeflow.testing import KNOWN

PATHS, FINEST = 20_000, 8
STEPS = [2**k for k in range(4, FINEST + 1)]
SOLVERS = [
    name
    for name, entry in catalogue("solver").items()
    if entry.distribution == "sdeflow"
    and get("solver", name).strong_order is not None
    and not get("solver", name).adaptive
    if name != "torchsde"  # it is torchsde_euler
]
ABOVE = {
    # Where more is seen than is declared: x sqrt(1 + t) has constant coefficients, so that a method
    # which follows g within the step is left with its error on the ODE, of order 2.
    (solver, problem): 2
    for solver in (
        "heun",
        "srk",
        "platen",
        "torchsde_srk",
        "torchsde_heun",
        "torchsde_midpoint",
        "torchsde_log_ode",
        "torchsde_reversible_heun",
    )
    for problem in ("additive", "additive_system")
}


def grid(steps):
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64)


class Replay:
    """A stretch of Brownian paths in equal steps on [0, 1], kept: z and zeta (steps, B, *)."""

    def __init__(self, z, zeta):
        self.z, self.zeta = z, zeta

    @classmethod
    def of(cls, path, steps):
        pairs = list(zip(grid(steps)[:-1], grid(steps)[1:], strict=True))
        return cls(
            torch.stack([path(t, s) for t, s in pairs]),
            torch.stack([path.area(t, s) for t, s in pairs]),
        )

    def __call__(self, t, s):
        return self.z[round(float(t) * len(self.z))]

    def area(self, t, s):
        return self.zeta[round(float(t) * len(self.z))]

    def halved(self):
        """The same paths in steps twice as long."""
        (a, b), (p, q) = ((v[0::2], v[1::2]) for v in (self.z, self.zeta))
        return Replay((a + b) / 2**0.5, 6**0.5 / 4 * (a - b) + (p + q) / 8**0.5)


def test_halving_is_what_a_brownian_path_shows_at_longer_steps():
    path = BrownianPath(3, (50, 2), grid(32))
    replay = Replay.of(path, 32)
    for steps in (16, 8):
        replay, seen = replay.halved(), Replay.of(path, steps)
        torch.testing.assert_close(replay.z, seen.z, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(replay.zeta, seen.zeta, rtol=1e-12, atol=1e-12)


def slope(errors):
    """Of the straight line through (k, -log2 error), k the logarithm of the number of steps."""
    k = torch.arange(len(errors), dtype=torch.float64)
    k = k - k.mean()
    return -float((k * torch.tensor(errors, dtype=torch.float64).log2()).sum() / (k * k).sum())


def accepted(sde):
    """{name: solver} of all that take the SDE."""
    found = {}
    for name in SOLVERS:
        try:
            (solver := get("solver", name)).check(sde)
        except PairingError:
            continue
        found[name] = solver
    return found


def measured(known, solvers, paths=PATHS):
    """{name: its five errors}, on the same paths."""
    errors = {name: torch.zeros(len(STEPS), dtype=torch.float64) for name in solvers}
    size = known.sde.noise_shape(known.x0(1)).numel()
    chunks = max(size // 2, 1)
    for chunk in range(chunks):
        x = known.x0(paths // chunks)
        # The Levy areas of the reference are known the better the finer its grid.
        extra = 2 if known.levy else 0
        finest = 2 ** (FINEST + extra)
        path = BrownianPath(chunk, known.sde.noise_shape(x), grid(finest))
        replay = Replay.of(path, finest)
        exact = known.exact(replay, grid(finest))
        for _ in range(extra):
            replay = replay.halved()
        for j in reversed(range(len(STEPS))):
            for name, solver in solvers.items():
                end = integrate(known.sde, x, grid(STEPS[j]), solver, noise=replay).x
                miss = (end - exact).flatten(1).norm(dim=1).mean()
                errors[name][j] += float(miss) / chunks
            replay = replay.halved()
    return {name: found.tolist() for name, found in errors.items()}


@pytest.mark.parametrize("problem", KNOWN)
def test_the_strong_order_of_every_solver_is_the_declared(problem):
    known = KNOWN[problem]
    solvers, found = accepted(known.sde), {}
    for name, errors in measured(known, solvers).items():
        declared = solvers[name].strong_order_on(known.sde)
        expected = ABOVE.get((name, problem), declared)
        assert expected >= declared
        found[name] = round(slope(errors), 3), expected
    print(problem, found)  # pytest -s: the table
    assert {name: pair for name, pair in found.items() if not abs(pair[0] - pair[1]) <= 0.1} == {}


def test_what_is_refused_is_what_the_noise_forbids():
    without = {name: set(SOLVERS) - set(accepted(known.sde)) for name, known in KNOWN.items()}
    refused = without.pop("noncommutative")
    assert {"milstein", "srk", "torchsde_milstein", "torchsde_srk"} <= refused
    assert all(not names for names in without.values())


# ---- additive, and coupled, where the solution is not known: a finer run on the same paths


class Swirl(SDE):
    """Two components that drive each other; noise strong enough to show its orders early."""

    def drift(self, x, t):
        return torch.stack(((2 * x[:, 1]).sin() + t, (2 * x[:, 0]).cos()), 1)

    def diffusion(self, x, t):
        return x.new_tensor([0.8, 1.0]) * (1 + t / 4)


class Additive(Swirl):
    additive = True


class AdditiveMatrix(Additive):
    noise = "matrix"

    def diffusion(self, x, t):
        g = x.new_tensor([[0.8, 0.2, 0.1], [-0.3, 1.0, 0.2]])
        return g.expand(len(x), 2, 3) * (1 + t / 4)


class Diagonal(Swirl):
    def diffusion(self, x, t):
        return 1 + 0.4 * (2 * x + t).sin()


class Scalar(Swirl):
    noise = "scalar"

    def diffusion(self, x, t):
        return torch.stack((0.7 + 0.3 * x[:, 1].cos(), 0.6 * x[:, 0] + t / 2), 1)


class Commuting(Swirl):
    """Linear noise of two commuting matrices, a rotation and the identity."""

    noise, commutative = "matrix", True

    def diffusion(self, x, t):
        return (1 + t) * torch.stack((0.4 * x, 0.6 * torch.stack((-x[:, 1], x[:, 0]), 1)), 2)


NATIVE = ("euler_maruyama", "milstein", "euler_heun", "heun", "srk", "platen")
COUPLED = [Additive(), AdditiveMatrix(), Diagonal(), Scalar(), Commuting()]


def against_a_finer_run(sde, solvers):
    """{name: slope} against the most exact solver at 2^-11: 1,500 paths, steps 2^-4 to 2^-7."""
    x = torch.tensor([1.0, 0.5], dtype=torch.float64).expand(1500, 2)
    best = max(
        (get("solver", name) for name in NATIVE if name in accepted(sde)),
        key=lambda solver: solver.strong_order_on(sde),
    )
    fine = Replay.of(BrownianPath(5, sde.noise_shape(x), grid(2048)), 2048)
    exact = integrate(sde, x, grid(2048), best, noise=fine).x
    errors = {name: [] for name in solvers}
    while len(fine.z) > 16:
        fine = fine.halved()
        if len(fine.z) <= 128:
            for name, solver in solvers.items():
                end = integrate(sde, x, grid(len(fine.z)), solver, noise=fine).x
                errors[name].insert(0, float((end - exact).norm(dim=1).mean()))
    return {name: round(slope(found), 3) for name, found in errors.items()}


@pytest.mark.parametrize("sde", COUPLED, ids=lambda sde: type(sde).__name__)
def test_the_strong_order_holds_for_coupled_drifts_and_every_kind_of_noise(sde):
    """Here, unlike where x_t is a function of W_t alone, the areas matter."""
    solvers = {name: solver for name, solver in accepted(sde).items() if name in NATIVE}
    slopes = against_a_finer_run(sde, solvers)
    found = {name: (slopes[name], solvers[name].strong_order_on(sde)) for name in solvers}
    print(type(sde).__name__, found)
    assert {name: pair for name, pair in found.items() if not abs(pair[0] - pair[1]) <= 0.1} == {}


# ---- faults


class Uncorrected(Milstein):
    """Milstein's method without its second term."""

    def step(self, process, x, t, s, noise, memory):
        return EulerMaruyama().step(process, x, t, s, noise, memory)


@dataclass(frozen=True)
class Changed:
    """A noise source whose areas are not those of the path."""

    noise: object
    change: object

    def __call__(self, t, s):
        return self.noise(t, s)

    def area(self, t, s):
        return self.change(area(self.noise, t, s))


class WrongSign(SRK):
    """The area added where it should be subtracted."""

    def step(self, process, x, t, s, noise, memory):
        return super().step(process, x, t, s, Changed(noise, torch.neg), memory)


class OtherPath(SRK):
    """Areas drawn anew, not those of the path."""

    def step(self, process, x, t, s, noise, memory):
        other = Changed(noise, lambda zeta: zeta.roll(1, 0))
        return super().step(process, x, t, s, other, memory)


class ItoDrift(EulerHeun):
    """A Stratonovich scheme fed with the drift as it is."""

    calculus = "ito"


class IndependentStages(Heun):
    """Fresh normals in the second stage."""

    def step(self, process, x, t, s, noise, memory):
        h, first = s - t, process.drift(x, t)
        kick, other = (h.sqrt() * process.spread(x, t, z) for z in (noise(t, s), area(noise, t, s)))
        u = x + h * first + kick
        return x + h / 2 * (first + process.drift(u, s)) + (kick + other) / 2, None


class Symmetric(Milstein):
    """Milstein's method on noise that does not commute."""

    needs = ()

    def init(self, process, x, ts):
        return None


FAULTS = {
    # the solver            problem, the order that it is sold with
    Uncorrected(): ("cubic", 1),
    ItoDrift(): ("linear", 1),
    IndependentStages(): ("linear", 1),
    Symmetric(): ("noncommutative", 1),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_fault_is_found(fault):
    problem, sold = FAULTS[fault]
    known = KNOWN[problem]
    (errors,) = measured(known, {"fault": fault}, paths=2000).values()
    assert slope(errors) < sold - 0.3


@pytest.mark.parametrize("sde", [Additive(), Diagonal()], ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize("fault", [WrongSign(), OtherPath()], ids=lambda f: type(f).__name__)
def test_a_fault_in_the_area_costs_half_an_order(fault, sde):
    assert against_a_finer_run(sde, {"fault": fault})["fault"] == pytest.approx(1, abs=0.1)
