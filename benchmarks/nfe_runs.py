"""The runs of `nfe_error.py`: ours and the peers', each judged against the exact answer."""

from __future__ import annotations

import math
import statistics
from itertools import product

import nfe_peers as peers
import torch
from nfe_problems import PROBLEMS, Exact, Guided, Learned

import sdeflow
from sdeflow import get
from sdeflow.testing import output_law

BUDGETS = [5, 6, 8, 10, 15, 20, 30, 50, 100]
SDES = {"VP": sdeflow.VP(), "EDM": sdeflow.EDM()}
ZERO = {"to_zero": True}
GRIDS = {
    # fmt: off
    "log_snr": ("log_snr", {}),
    "log_snr, to 0": ("log_snr", ZERO),
    "karras": ("karras", {}),
    "karras, to 0": ("karras", ZERO),
    "angle": ("angle", {}),
    "angle, to 0": ("angle", ZERO),
    "arctan": ("arctan", {}),
    "uniform": ("uniform", {}),
    "quadratic": ("quadratic", {}),
    "beta": ("beta", {}),
    "shift": ("shift", {}),
    # fmt: on
}


class Case:
    """A problem under an SDE: the start, and the exact flow from it to any level."""

    def __init__(self, sde, problem, points):
        self.sde, self.problem = sde, problem
        generator = torch.Generator().manual_seed(0)
        self.z = torch.zeros_like(problem.draw(points, generator))
        self.z.normal_(generator=generator)
        top = torch.tensor(sde.T, dtype=torch.float64)
        self.x = sde.prior(self.z, top)
        self.y, self.exact = self.x / sde.alpha(top), {}
        low = torch.tensor(sde.t_min, dtype=torch.float64)
        self.start, end = (float(sde.sigma(t) / sde.alpha(t)) for t in (top, low))
        self.exact = {
            (self.start, e): s for e, s in problem.flow(self.y, self.start, [end, 0]).items()
        }

    def levels(self, ts):
        return (self.sde.sigma(ts) / self.sde.alpha(ts)).tolist()

    def error(self, made, end, y=None, start=None):
        """(RMS, median) of y at level `end` from where the flow goes."""
        start = self.start if start is None else start
        if (start, end) not in self.exact:
            y = self.y if y is None else y
            self.exact |= {(start, e): s for e, s in self.problem.flow(y, start, [end]).items()}
        each = (made - self.exact[start, end]).square().mean(1)
        return float(each.mean().sqrt()), float(each.sqrt().median())

    def process(self, eta=0.0):
        return sdeflow.ReverseSDE(self.sde, Exact(self.sde, self.problem), eta)


def solvers():
    """(on ODEs, on SDEs): {name: solver} of fixed steps, each once; an SDE's with its eta."""
    ode, sde, seen = {}, {}, set()
    for name in sdeflow.catalogue("solver"):
        solver = get("solver", name)
        if solver.adaptive or math.isnan(solver.evaluations) or "system" in solver.needs:
            continue
        if repr(solver) in seen or name.startswith("torchsde"):
            continue
        seen.add(repr(solver))
        if solver.order is not None and not solver.stochastic:
            ode[name] = solver
        if solver.weak_order is not None:
            sde[name] = solver, 1.0
        elif solver.stochastic:
            sde[name] = solver, 0.0
    return ode, sde


def within(budget, solver, sde, grid, options, run):
    """run(ts) on the longest grid that costs no more evaluations than the budget, or None."""
    for n in range(-(-budget // solver.evaluations), 0, -1):
        try:
            done = run(get("grid", grid)(sde, n, **options))
        except (sdeflow.NonFiniteError, sdeflow.GridError):
            return None
        if done.nfe <= budget:
            return done
    return None


def flow_errors(cases, candidates, grids, budgets):
    """{(range, problem, solver, grid, budget): (RMS, median)}."""
    found = {}
    for (sde_name, sde), (g, (grid, options)) in product(SDES.items(), grids.items()):
        of = [(p, case) for (s, p), case in cases.items() if s == sde_name]
        for (name, solver), budget, (p, case) in product(candidates.items(), budgets, of):

            def run(ts, case=case, solver=solver):
                return sdeflow.integrate(case.process(), case.x, ts, solver)

            if (done := within(budget, solver, sde, grid, options, run)) is not None:
                y, end = done.x / sde.alpha(done.ts[-1]), case.levels(done.ts[-1:])[0]
                found[sde_name, p, name, g, budget] = case.error(y, end)
    return found


def learned_errors(cases, candidates, budgets, sizes):
    """{(range, problem, solver, size, budget): (RMS, median)} to the flow of the exact score."""

    def denoiser(case, size):
        return Exact(case.sde, Learned(case.problem, size))

    return _choice_errors({size: cases for size in sizes}, candidates, budgets, denoiser)


def guided_errors(candidates, budgets, weights, points):
    """{(range, problem, solver, weight, budget): (RMS, median)} to the guided flow."""
    cases = {weight: {} for weight in weights}
    for weight, (s, sde), (p, first) in product(
        weights, SDES.items(), (("five", 1), ("digits", 5))
    ):
        mixture = PROBLEMS[p]()
        problem = Guided(mixture.means, mixture.variance, mixture.weights, weight, first)
        cases[weight][s, p] = Case(sde, problem, points)
    return _choice_errors(cases, candidates, budgets, lambda case, _: Exact(case.sde, case.problem))


def _choice_errors(cases, candidates, budgets, denoiser):
    found = {}
    for what, of in cases.items():
        for ((s, p), case), (name, g), budget in product(of.items(), candidates, budgets):
            ts = get("grid", GRIDS[g][0])(case.sde, budget, **GRIDS[g][1])
            process = sdeflow.probability_flow(case.sde, denoiser(case, what))
            x = sdeflow.integrate(process, case.x, ts, name).x
            error = case.error(x / case.sde.alpha(ts[-1]), case.levels(ts[-1:])[0])
            found[s, p, f"{name}, {g}", what, budget] = error
    return found


def amplified(candidates, budgets, samples=4096):
    """{(range, "", solver, 1, budget): (RMS, RMS)} of the output for D fresh unit normals."""

    class Fresh:
        def __init__(self):
            self.generator = torch.Generator().manual_seed(0)

        def denoise(self, x, t):
            return torch.randn(x.shape, dtype=x.dtype, generator=self.generator)

    found, x = {}, torch.zeros(samples, 1, dtype=torch.float64)
    for (s, sde), (name, g), budget in product(SDES.items(), candidates, budgets):
        ts = get("grid", GRIDS[g][0])(sde, budget, **GRIDS[g][1])
        made = sdeflow.integrate(sdeflow.probability_flow(sde, Fresh()), x, ts, name).x
        found[s, "", f"{name}, {g}", 1, budget] = (float(made.square().mean().sqrt()),) * 2
    return found


# ---- peers


def same_errors(cases, grids, budgets):
    """{(range, problem, row of SAME, grid, budget): (ours, theirs)}: same levels, same x_T."""
    found = {}
    for ((s, p), case), (row, (name, options, peer, theirs, zero)), g, budget in product(
        cases.items(), enumerate(peers.SAME), grids, budgets
    ):
        solver, (grid, extra) = get("solver", name, **options), GRIDS[g]
        if zero is not None and zero != bool(extra):
            continue
        n = (budget + 1) // 2 if name == "edm_heun" else budget
        ts = get("grid", grid)(case.sde, n, **extra)
        levels = case.levels(ts)
        run = sdeflow.integrate(case.process(), case.x, ts, solver)
        made, nfe = peers.on_levels(peers.make(peer, theirs), case.problem, case.y, levels)
        if nfe != run.nfe:
            raise RuntimeError(f"{name}: {run.nfe} evaluations of ours, {nfe} of {peer}")
        ours = case.error(run.x / case.sde.alpha(ts[-1]), levels[-1])
        found[s, p, row, g, budget] = ours, case.error(made, levels[-1])
    return found


def official_errors(cases, grids, budgets):
    """{(range, problem, name, grid, budget): (RMS, median)} of the official DPM-Solver."""
    found = {}
    for ((s, p), case), g, budget, order, data in product(
        cases.items(), grids, budgets, (2, 3), (True, False)
    ):
        grid, extra = GRIDS[g]
        if extra:
            continue
        levels = case.levels(get("grid", grid)(case.sde, budget))
        made, _ = peers.official(case.problem, case.y, levels, order, data)
        name = f"official DPM-Solver{'++' * data} {order}M"
        found[s, p, name, g, budget] = case.error(made, levels[-1])
    return found


def default_errors(cases, budgets):
    """{(range, problem, peer, "its own", budget): (RMS, median)} of diffusers' own settings."""
    found = {}
    for ((s, p), case), budget in product(cases.items(), budgets):
        for name, options in peers.VP_DEFAULTS if s == "VP" else peers.EDM_DEFAULTS:
            scheduler = peers.make(name, options)
            y, made, start, end = peers.by_itself(scheduler, case.problem, budget, case.z)
            found[s, p, peers.called(name, options), "its own", budget] = case.error(
                made, end, y, start
            )
    return found


# ---- laws


def law_errors(problem, candidates, grids, budgets):
    """The same keys: (W2, W2) of the output's law to the true one, exactly, an RMS over axes."""
    found = {}
    for (s, sde), (g, (grid, options)), (name, (solver, eta)), budget in product(
        SDES.items(), grids.items(), candidates.items(), budgets
    ):
        process = sdeflow.ReverseSDE(sde, Exact(sde, problem), eta)
        zero = torch.zeros_like(problem.variance)

        def run(ts, process=process, solver=solver, zero=zero):
            return sdeflow.integrate(process, zero.expand(1, -1), ts, solver, seed=0)

        if (done := within(budget, solver, sde, grid, options, run)) is None:
            continue
        first, last = (
            sde.alpha(t) ** 2 * problem.variance + sde.sigma(t) ** 2 for t in done.ts[[0, -1]]
        )
        try:
            mean, variance = output_law(process, done.ts, solver, zero, first)
        except sdeflow.SdeflowError:  # a Langevin step, which is not affine
            continue
        off = variance.clamp_min(0).sqrt() - last.sqrt()
        w2 = float((mean**2 + off**2).mean().sqrt())
        if math.isfinite(w2):
            found[s, "spectrum", name, g, budget] = w2, w2
    return found


def sliced(x, quantiles, directions):
    """Sliced W2 from samples x (n, d) to quantiles of the truth along the directions, (n, k)."""
    return float(((x @ directions).sort(0).values - quantiles).square().mean().sqrt())


def sliced_errors(candidates, grids, budgets, samples):
    """The same keys: sliced W2 to the mixtures; the noise left at t_min is small beside it."""
    found, floors = {}, {}
    for (s, sde), p in product(SDES.items(), ("five", "digits")):
        generator, problem = torch.Generator().manual_seed(1), PROBLEMS[p]()
        truth = problem.draw(16 * samples, generator)
        directions = torch.randn(truth.shape[1], 64, dtype=torch.float64, generator=generator)
        directions /= directions.norm(dim=0)
        start = sde.prior(torch.randn(truth[:samples].shape, generator=generator).double())
        along = (truth @ directions).sort(0).values.view(samples, 16, -1).mean(1)
        draws = [sliced(problem.draw(samples, generator), along, directions) for _ in range(5)]
        floors[s, p] = statistics.mean(draws)
        for (g, (grid, options)), (name, (solver, eta)), budget in product(
            grids.items(), candidates.items(), budgets
        ):
            process = sdeflow.ReverseSDE(sde, Exact(sde, problem), eta)

            def run(ts, process=process, solver=solver, x=start):
                fresh = torch.Generator().manual_seed(2)

                def noise(t, s):
                    return torch.randn(x.shape, dtype=torch.float64, generator=fresh)

                return sdeflow.integrate(process, x, ts, solver, noise=noise)

            if (done := within(budget, solver, sde, grid, options, run)) is not None:
                w2 = sliced(done.x, along, directions)
                found[s, p, name, g, budget] = w2, w2
    return found, floors
