"""The certificate: a stranger's solver in one call, its report, its groups, its sampled tier."""

import math
from dataclasses import dataclass

import pytest
import torch
from faults import FAULTS, Taylor
from sdeflow_plugins.solvers.ddim import DDIM
from sdeflow_plugins.solvers.ddpm import DDPM
from sdeflow_plugins.solvers.er_sde import ERSDE
from ztest import LIMIT

from sdeflow import (
    VP,
    ArgumentError,
    Solver,
    SolverError,
    StepSolver,
    TorchDiffEq,
    UnknownNameError,
    get,
)
from sdeflow.testing import check_solver, measures, weak_errors
from sdeflow.testing.certificate import GROUPS
from sdeflow.testing.ground import KERNELS, SYSTEMS, Subject
from sdeflow.testing.orders import asymptotic_order
from sdeflow.testing.report import Check, CheckFailed, Report


class Stranger(StepSolver):
    """Euler's method as somebody else writes it: no dataclass, nothing declared but its orders."""

    order = weak_order = 1

    def step(self, process, x, t, s, noise, memory):
        moved = x + (s - t) * process.drift(x, t)
        if process.deterministic:
            return moved, None
        return moved + (t - s).sqrt() * process.spread(x, t, noise(t, s)), None


class Loop(Solver):
    """A black box: it owns its loop, and has no step."""

    order = 1
    needs = ("ode",)

    def solve(self, process, x, ts, noise):
        for t, s in zip(ts[:-1], ts[1:], strict=True):
            x = x + (s - t) * process.drift(x, t)
            yield s, x


class DownOnly(Stranger):
    needs = ("reverse",)


@pytest.mark.parametrize("solver", [DownOnly(), Loop()], ids=["step", "loop"])
def test_a_strangers_solver_passes(solver):
    report = check_solver(solver)
    report.raise_if_failed()
    assert report.figures["order"] == pytest.approx(1, abs=0.05)
    assert report.figures["affine"] and report.figures["fused"] == isinstance(solver, StepSolver)


def test_a_strangers_mistake_is_named():
    """sqrt(t - s) is no number where a forward SDE runs up in time, and Stranger accepts those."""
    report = check_solver(Stranger(), only=["forward", "orders"])
    assert [check.name for check in report.failures] == ["forward"]
    with pytest.raises(CheckFailed, match=r"FAIL +forward .*NaN(?s:.*)FAILED \(1 of \d+\)"):
        report.raise_if_failed()


# ---- its arguments


def test_it_takes_a_name_or_an_object():
    by_name, by_object = (check_solver(each, only=["points"]) for each in ("ddim", DDIM()))
    assert by_name.title == "ddim: DDIM" and by_object.title == "DDIM(): DDIM"
    assert by_name.checks == by_object.checks


@pytest.mark.parametrize("wrong", [DDIM, lambda x: x, None, 3])
def test_what_is_no_solver_is_refused(wrong):
    with pytest.raises(ArgumentError, match="must be a Solver, such as DDIM"):
        check_solver(wrong)


def test_an_unknown_name_or_group_is_refused():
    with pytest.raises(UnknownNameError, match="did you mean"):
        check_solver("dpmpp_2n")
    with pytest.raises(ArgumentError, match="only='order' is unknown; did you mean 'orders'"):
        check_solver(DDIM(), only=["order"])


def test_only_runs_the_groups_asked_for():
    names = {group: {c.name for c in check_solver(DDIM(), only=[group]).checks} for group in GROUPS}
    assert all("runs" in found for found in names.values())
    assert names["points"] == {
        "runs", "one-point data", "points near the data", "points at sigma = 0",
    }  # fmt: skip
    whole = {check.name for check in check_solver(DDIM()).checks}
    assert whole == set().union(*names.values())


def test_every_group_has_a_planted_fault():
    silent = set(GROUPS) - {group for group, _ in FAULTS.values()}
    assert silent == {"eta to zero"}  # `laws` finds the same faults, and says by how much


# ---- what is measured


def test_the_order_is_measured_where_errors_are_above_rounding():
    figures = check_solver("torchdiffeq_rk4", only=["orders"]).figures
    assert figures["order"] == pytest.approx(4, abs=0.1)
    assert asymptotic_order({160: 1e-13, 320: 1e-14}, 1e-12) == math.inf
    assert asymptotic_order({40: 1e-6, 80: 1e-9, 160: 1e-13}, 1e-12) == pytest.approx(
        9.97, abs=0.01
    )
    assert asymptotic_order({160: 1e-3, 320: math.nan}, 1e-12) == -math.inf


@pytest.mark.parametrize("declared", [1, 2])
def test_the_order_measured_is_that_declared_or_more(declared):
    solver = Taylor()
    object.__setattr__(solver, "order", declared)
    check_solver(solver, only=["orders"]).raise_if_failed()


def test_the_two_variances_of_ddpm_enclose_the_truth():
    """Errors of opposite signs on Gaussian data: the best fixed variance lies between."""
    small, large = (
        weak_errors(DDPM(variance=name), VP(), 1.0, [80])[0] for name in ("small", "large")
    )
    assert small < 0 < large


def test_the_path_tells_er_sde_from_the_reverse_sde():
    """With its own noise scale it keeps the marginals, and not the paths; with the SDE's, both."""
    own, right = (Subject(ERSDE(2, scale)) for scale in ("er_sde_5", "sde"))
    (law, path), (_, same) = (each.errors(VP(), 1.0, 72) for each in (own, right))
    assert law < 0.05 < path and same < 0.05
    check_solver(ERSDE(2, "sde"), only=["laws"]).raise_if_failed()


def test_solvers_for_systems_have_a_ground_of_their_own():
    assert Subject(DDIM()).ground is KERNELS
    assert Subject(get("solver", "gddim")).ground is SYSTEMS


def test_a_solver_that_accepts_nothing_is_told_why():
    class Picky(DDIM):
        needs = ("gaussian", "ode", "noise")

    report = check_solver(Picky())
    assert [check.name for check in report.checks] == ["runs"]
    assert "is deterministic" in str(report)


# ---- adaptive solvers


def test_an_adaptive_solver_is_held_to_its_tolerance():
    report = check_solver(TorchDiffEq("bosh3"), only=["orders"])
    (tolerance,) = (check for check in report.checks if check.name == "tolerance")
    assert tolerance.passed and "order" not in report.figures


def test_an_adaptive_solver_without_tolerances_fails():
    class Fixed(Loop):
        adaptive = True
        evaluations = math.nan

    report = check_solver(Fixed(), only=["orders"])
    assert report.failures[0].detail == "adaptive, and has no rtol and atol to be tried at"


# ---- the sampled tier: |z| < 5, a false alarm once in 1.7 million


@dataclass(frozen=True)
class Rippled(DDIM):
    """DDIM with a ripple on D, too small to matter, that no affine map has. The rest is faults."""

    spread: float = 1.0
    shift: float = 0.0

    def step(self, process, x, t, s, noise, memory):
        data = process.denoise(x, t)
        data = data + 1e-3 * torch.sin(data)
        mean, std = process.gaussian.posterior(x, data, t, s, process.eta)
        return mean + self.shift * (t - s) + self.spread * std * noise(t, s), None


def sampled(solver):
    """The sampled checks, by name."""
    report = check_solver(solver, only=["laws"])
    assert not report.figures["affine"]
    assert all("by chance once in 1.7 million" in check.detail for check in report.checks[1:])
    return {check.name: check.passed for check in report.checks[1:]}


def test_a_solver_that_is_not_affine_is_sampled():
    assert measures.LIMIT == LIMIT
    assert sampled(Rippled()) == {
        f"marginals, eta = {eta}, sampled": True for eta in ("0", "1", "0.5")
    }


@pytest.mark.parametrize(
    ("fault", "caught"),
    [(Rippled(spread=1.1), ("1",)), (Rippled(shift=0.5), ("0", "1", "0.5"))],
    ids=["spread", "shift"],
)
def test_the_sampled_tier_rejects_a_planted_bias(fault, caught):
    checks = sampled(fault)
    assert not any(checks[f"marginals, eta = {eta}, sampled"] for eta in caught)


# ---- reports


def test_a_report_prints_every_check_and_the_verdict():
    report = Report("mine", [Check("a", True, "fine"), Check("longer", False)])
    assert str(report).splitlines() == [
        "mine", "  ok    a       fine", "  FAIL  longer", "  FAILED (1 of 2)",
    ]  # fmt: skip
    assert not report.ok and [check.name for check in report.failures] == ["longer"]


def test_an_exception_in_a_group_is_a_failure_of_it():
    def broken():
        yield Check("first", True)
        raise SolverError("gone")

    report = Report("mine")
    report.run("group", broken)
    assert report.checks == [Check("first", True), Check("group", False, "SolverError: gone")]


def test_the_seconds_are_told():
    assert 0 < check_solver(DDIM(), only=["points"]).figures["seconds"] < 60


def test_states_of_the_ground_are_apart():
    for ground in (KERNELS, SYSTEMS):
        assert len(torch.unique(ground.start(8).flatten(1), dim=0)) == 8
