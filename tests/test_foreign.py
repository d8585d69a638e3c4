"""The audit of foreign samplers: right ones pass with their orders, planted faults do not."""

import math

import numpy as np
import pytest
import torch
import torchsde

from sdeflow import EDM, VP, Denoiser, ReverseSDE, integrate, probability_flow
from sdeflow.errors import ArgumentError
from sdeflow.testing import (
    GaussianData,
    audit,
    azula_sampler,
    diffusers_scheduler,
    foreign,
    k_diffusion,
    native,
    output_law,
    output_law_of,
)
from sdeflow.testing.auditing import grid
from sdeflow.testing.intercept import Fixed, UnitVectors

DOUBLE = torch.float64
COARSE = (30, 120)
GAUSS = (torch.tensor([0.5, -1.0], dtype=DOUBLE), torch.tensor([0.16, 2.0], dtype=DOUBLE))


# ---- strangers, as they are found: time is the noise level


def euler(denoise, x, ts):
    for t, s in zip(ts, ts[1:], strict=False):
        x = x + (s - t) * (x - denoise(x, t)) / t
    return x


def heun(denoise, x, ts):
    for t, s in zip(ts, ts[1:], strict=False):
        slope = (x - denoise(x, t)) / t
        y = x + (s - t) * slope
        if s > 0:
            slope = (slope + (y - denoise(y, s)) / s) / 2
        x = x + (s - t) * slope
    return x


def ancestral(denoise, x, ts, scale=lambda v: v.sqrt(), noise=torch.randn_like):
    for t, s in zip(ts, ts[1:], strict=False):
        data = denoise(x, t)
        mean = data + (s / t) ** 2 * (x - data)
        x = mean + scale(s**2 * (1 - (s / t) ** 2)) * noise(x)
    return x


# ---- and with faults


def heun_of_old_level(denoise, x, ts):
    for t, s in zip(ts, ts[1:], strict=False):
        slope = (x - denoise(x, t)) / t
        y = x + (s - t) * slope
        x = x + (s - t) * (slope + (y - denoise(y, t)) / t) / 2
    return x


def second_order_with_noise_of_two_stages(denoise, x, ts):
    """A midpoint step of the reverse SDE whose stages do not see the same noise."""

    def step(x, data, t, s):
        mean = data + (s / t) ** 2 * (x - data)
        return mean + s * (1 - (s / t) ** 2).sqrt() * torch.randn_like(x)

    for t, s in zip(ts, ts[1:], strict=False):
        middle = (t * s).sqrt()
        x = step(x, denoise(step(x, denoise(x, t), t, middle), middle), t, s)
    return x


def coupled(denoise, x, ts):
    return euler(denoise, x, ts) + 1e-3 * x.mean()


class Remembers:
    def __init__(self):
        self.last = 0.0

    def __call__(self, denoise, x, ts):
        x = euler(denoise, x, ts) + 0.1 * self.last
        self.last = float(x.mean())
        return x


def laundered(denoise, x, ts):
    return euler(lambda x, t: torch.nan_to_num(denoise(x, t)), x, ts)


def waits(denoise, x, ts):
    while not bool(denoise(x, ts[-1]).isfinite().all()):
        pass
    return euler(denoise, x, ts)


def mean_off(denoise, x, ts):
    return euler(denoise, x, ts) + 0.3


FAULTS = {
    # sampler, claimed order, what must be found
    "heun of the old level": (heun_of_old_level, 2, "order"),
    "a constant added": (mean_off, 1, "order"),
    "variance for std": (lambda f, x, ts: ancestral(f, x, ts, lambda v: v), 1, "weak order"),
    "noise one level late": (
        lambda f, x, ts: ancestral(f, x, ts, lambda v: 1.1 * v.sqrt()), 1, "weak order",
    ),
    "noise of two stages": (second_order_with_noise_of_two_stages, 2, "weak order"),
    "one noise for the batch": (
        lambda f, x, ts: ancestral(f, x, ts, noise=lambda x: torch.randn(1, x.shape[1])),
        1, "noise",
    ),
    "noise of numpy": (
        lambda f, x, ts: ancestral(
            f, x, ts, noise=lambda x: torch.from_numpy(np.random.standard_normal(x.shape))
        ),
        1, "repeats",
    ),
    "state between runs": (Remembers(), 1, "repeats"),
    "batch mates": (coupled, 1, "batch"),
    "float32 returned": (lambda f, x, ts: euler(f, x, ts).float(), 1, "dtype"),
    "wrong shape": (lambda f, x, ts: euler(f, x, ts)[:1], 1, "runs"),
    "NaN returned": (lambda f, x, ts: euler(f, x, ts) * math.nan, 1, "runs"),
    "NaN laundered": (laundered, 1, "non-finite"),
    "never ends on NaN": (waits, 1, "non-finite"),
}  # fmt: skip


def failed(report):
    return {check.name for check in report.failures}


@pytest.mark.parametrize(
    ("sampler", "order", "evaluations"),
    [(euler, 1, 1), (heun, 2, 2), (ancestral, 1, 1)],
    ids=["euler", "heun", "ancestral"],
)
def test_a_right_sampler_passes_with_its_order(sampler, order, evaluations):
    report = audit(sampler, order, evaluations=evaluations, exact_on_points=True, steps=(40, 80))
    report.raise_if_failed()
    measured = report.figures["weak order" if sampler is ancestral else "order"]
    assert measured == pytest.approx(order, abs=0.1)
    assert report.figures["stochastic"] == (sampler is ancestral)
    assert report.figures["precision"] == "float64"
    assert report.figures["at sigma 0"] == "finite"


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name):
    sampler, claimed, found = FAULTS[name]
    assert found in failed(audit(sampler, claimed, steps=COARSE))


def test_claims_about_evaluations_and_points_are_judged():
    assert "evaluations" in failed(audit(heun, 2, evaluations=1, steps=COARSE))
    large = foreign(lambda f, x, ts: ancestral(f, x, ts, lambda v: v.sqrt() * 1.05))
    assert "one-point data" in failed(audit(large, exact_on_points=True, steps=COARSE))


def test_a_division_by_sigma_zero_is_found():
    def heun_to_the_end(denoise, x, ts):
        for t, s in zip(ts, ts[1:], strict=False):
            slope = (x - denoise(x, t)) / t
            y = x + (s - t) * slope
            x = x + (s - t) * (slope + (y - denoise(y, s)) / s) / 2
        return x

    report = audit(heun_to_the_end, 2, steps=COARSE)
    assert failed(report) == {"sigma = 0"}
    assert report.figures["at sigma 0"] == "not finite"


@pytest.mark.parametrize(("bound", "passes"), [(30.0, True), (0.8, False)])
def test_what_is_not_affine_is_sampled(bound, passes):
    """The bias of the right one is 0.02; a limit of 0.1 and 5 standard errors: 1 in 1.7 million."""

    def bounded(denoise, x, ts):
        return euler(lambda x, t: bound * (denoise(x, t) / bound).tanh(), x, ts)

    report = audit(bounded, steps=COARSE)
    assert report.figures["affine"] is False and report.figures["weak order"] is None
    assert ("law, sampled" in failed(report)) == (not passes)
    with pytest.raises(ArgumentError, match="not affine"):
        output_law_of(
            foreign(lambda f, x, ts: x.tanh()), grid(EDM(), 3), GaussianData(EDM(), *GAUSS)
        )


# ---- the law


@pytest.mark.parametrize(("name", "eta"), [("ddim", 0.0), ("ddpm", 1.0), ("dpmpp_2m", 1.0)])
def test_the_law_read_off_from_outside_is_the_law_known_inside(name, eta):
    sampler, data = native(name, eta), GaussianData(VP(), *GAUSS)
    ts = grid(VP(), 12)
    process = ReverseSDE(VP(), Denoiser(data.denoise, VP(), "data"), eta)
    inside = output_law(process, ts, name, *data.law(ts[0]))
    for ours, theirs in zip(inside, output_law_of(sampler, ts, data), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_a_brownian_tree_keeps_its_path_under_interception():
    """Increments over two halves add up to that of the whole; variances are lengths."""

    def weights(rows):
        with torch.random.fork_rng(), UnitVectors(rows, 1) as noise:
            tree = torchsde.BrownianInterval(
                0.0, 1.0, size=(rows, 1), dtype=DOUBLE, entropy=7, halfway_tree=True, tol=1e-6
            )
            found = [tree(a, b) for a, b in ((0.5, 1.0), (0.0, 1.0), (0.25, 0.5), (0.0, 0.5))]
        return noise.draws, found

    late, whole, quarter, early = (w[3:] for w in weights(3 + weights(3)[0])[1])
    torch.testing.assert_close(early + late, whole)
    for increment, length in ((late, 0.5), (whole, 1.0), (quarter, 0.25)):
        assert float(increment.square().sum()) == pytest.approx(length)
    assert float((early * late).sum()) == pytest.approx(0, abs=1e-12)


# ---- noise


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.randn(5, 2),
        lambda: torch.randn((5, 2), generator=torch.Generator()),
        lambda: torch.randn_like(torch.zeros(5, 2)),
        lambda: torch.empty(5, 2).normal_(),
        lambda: torch.normal(torch.zeros(5, 2), torch.ones(5, 2)),
        lambda: torch.normal(0.0, 1.0, (5, 2)),
        lambda: (torch.empty(5, 2).normal_(3.0, 2.0) - 3) / 2,
        lambda: (torch.normal(torch.full((5, 2), 3.0), std=2.0) - 3) / 2,
    ],
    ids=["randn", "generator", "randn_like", "normal_", "normal", "sized", "mean", "std"],
)
def test_every_way_to_draw_normals_is_intercepted(draw):
    with torch.random.fork_rng(), Fixed() as noise:
        made = draw()
    torch.testing.assert_close(made.double(), noise.draw(0, (5, 2)), rtol=1e-6, atol=1e-6)


def test_the_generator_moves_as_it_would_and_equal_seeds_give_equal_noise():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        torch.randn(4, 2)
        after = torch.rand(1)
        torch.manual_seed(1)
        with Fixed() as noise:
            first, again = torch.randn(4, 2), torch.randn(4, 2)
            torch.manual_seed(1)
            repeated = torch.randn(4, 2)
        torch.manual_seed(1)
        with Fixed():
            torch.randn(4, 2)
        assert torch.equal(torch.rand(1), after)
    assert torch.equal(first, repeated) and not torch.equal(first, again) and noise.draws == 2


# ---- adapters


def test_k_diffusion_functions_get_sigmas_or_the_ends_of_the_grid():
    def sample_given(model, x, sigmas, extra_args=None, disable=None, s_noise=1.0):
        return euler(lambda x, t: model(x, t * x.new_ones(len(x))), x, sigmas)

    def sample_own(model, x, sigma_min, sigma_max, n, disable=None):
        steps = torch.linspace(math.log(sigma_max), math.log(sigma_min), n + 1, dtype=DOUBLE)
        return euler(model, x, steps.exp())

    for sample in (sample_given, sample_own):
        report = audit(k_diffusion(sample), 1, steps=COARSE)
        report.raise_if_failed()
    assert k_diffusion(sample_given, s_noise=0.9).name == "sample_given, s_noise=0.9"


def test_azula_samplers_run_on_a_process_of_ours():
    class Sampler:
        def __init__(self, denoiser, silent=False, steps=64):
            self.denoiser, self.steps = denoiser, steps

        @property
        def timesteps(self):
            return torch.linspace(1, 0, self.steps + 1)

        def __call__(self, x):
            for t, s in self.timesteps.unfold(0, 2, 1):
                (a, b), (c, d) = self.denoiser.schedule(t), self.denoiser.schedule(s)
                data = self.denoiser(x, t).mean
                x = c * data + d / b * (x - a * data)
            return x

    report = audit(azula_sampler(Sampler), 1, exact_on_points=True, steps=COARSE)
    report.raise_if_failed()
    assert report.figures["order"] == pytest.approx(1, abs=0.05)


# fmt: off
DIFFUSERS = [
    # scheduler, settings, claimed, measured, passes
    ("DDIMScheduler", {"clip_sample": False}, 1, 0.99, True),
    ("DDPMScheduler", {"clip_sample": False}, 1, 0.93, True),
    ("EulerDiscreteScheduler", {}, 1, 0.99, True),
    ("EulerAncestralDiscreteScheduler", {}, 1, 0.93, True),
    ("HeunDiscreteScheduler", {}, 2, 2.03, True),
    ("KDPM2DiscreteScheduler", {}, 2, 2.02, True),
    ("DPMSolverMultistepScheduler", {"solver_order": 2}, 2, 2.00, True),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}, 3, 2.00, False),
    ("EDMDPMSolverMultistepScheduler", {"solver_order": 3}, 3, 2.00, False),
    ("DPMSolverMultistepScheduler",
     {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}, 2, 1.94, True),
    ("DPMSolverMultistepScheduler",
     {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}, 3, 1.03, False),
    ("DPMSolverSinglestepScheduler", {"solver_order": 2, "lower_order_final": True}, 2, 1.97, True),
    ("DPMSolverSinglestepScheduler",
     {"solver_order": 2, "lower_order_final": True, "algorithm_type": "sde-dpmsolver++"},
     2, 0.76, False),
    ("UniPCMultistepScheduler", {"solver_order": 2, "lower_order_final": False}, 2, 2.99, True),
    ("IPNDMScheduler", {}, 4, 2.03, False),
    ("FlowMatchHeunDiscreteScheduler", {}, 2, 2.00, True),
]
# fmt: on


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # torch, numpy
@pytest.mark.parametrize(
    ("name", "settings", "claimed", "measured", "passes"),
    DIFFUSERS,
    ids=["-".join(map(str, (row[0], *row[1].values()))) for row in DIFFUSERS],
)
def test_the_orders_of_diffusers_schedulers(name, settings, claimed, measured, passes):
    diffusers = pytest.importorskip("diffusers")
    sampler = diffusers_scheduler(getattr(diffusers, name)(**settings))
    report = audit(sampler, claimed, steps=(40, 80))
    figures = report.figures
    found = figures["weak order" if figures["stochastic"] else "order"]
    assert found == pytest.approx(measured, abs=0.08)
    assert not (failed(report) & {"order", "weak order"}) == passes
    assert not failed(report) - {"order", "weak order", "sigma = 0"}


def test_a_scheduler_at_the_table_of_the_test_is_our_solver():
    """The adapter adds nothing: diffusers' DDIM and ours agree to rounding on one run."""
    diffusers = pytest.importorskip("diffusers")
    data, ts = GaussianData(VP(), *GAUSS), grid(VP(), 10)
    x = torch.linspace(-2, 2, 8, dtype=DOUBLE).reshape(4, 2)
    theirs = diffusers_scheduler(diffusers.DDIMScheduler(clip_sample=False))
    ours = integrate(probability_flow(VP(), Denoiser(data.denoise, VP(), "data")), x, ts, "ddim").x
    torch.testing.assert_close(theirs.run(data.denoise, x, ts), ours, rtol=1e-9, atol=1e-9)


def test_a_scheduler_without_a_table_is_refused():
    diffusers = pytest.importorskip("diffusers")
    with pytest.raises(ArgumentError, match="takes no trained_betas"):
        diffusers_scheduler(diffusers.ScoreSdeVeScheduler())


@pytest.mark.parametrize("steps", [(20,), (40, 20)])
def test_steps_that_give_no_slope_are_refused(steps):
    with pytest.raises(ArgumentError, match="increasing"):
        audit(euler, steps=steps)
