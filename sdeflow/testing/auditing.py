"""`audit`: the certificate of a foreign sampler.

A deterministic one is measured against the exact flow of a Gaussian mixture; the law of what any
returns on Gaussian data is read off exactly, or, where the run is not affine, sampled with a stated
false-alarm rate; the rest is tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..backends import TorchDiffEq
from ..errors import ArgumentError
from ..grid import log_snr
from ..reverse import ReverseSDE
from ..sample import integrate
from ..sde import GaussianSDE
from .foreign import DOUBLE, Endless, Foreign, Run, foreign, output_law_of, run_on
from .intercept import Fixed, UnitVectors
from .orders import SLACK, asymptotic_order
from .problems import GaussianData, MixtureData
from .report import Check, Report

LOG_SNR = (-7.0, 6.0)
"""The ends of the test's grids, 2 log(alpha/sigma): from nearly noise to nearly data."""
SAMPLES, LIMIT, BIAS = 20_000, 5.0, 0.1
"""Sampled laws: a bias above BIAS and 5 standard errors fails, once in 1.7 million by chance."""


def audit(
    sampler: Foreign | Run,
    claimed_order: float | None = None,
    *,
    evaluations: float | None = None,
    exact_on_points: bool = False,
    steps: Sequence[int] = (20, 40, 80, 160),
) -> Report:
    """Measure a foreign sampler, and compare it with what is claimed for it.

    sampler: a Foreign, from `foreign` or an adapter, or a plain f(denoise, x_T, ts) -> x.
    claimed_order: of the error in a number of steps: of the law (weak) for a sampler that adds
        noise, of the samples (RMS) for one that does not. None: measured, not judged.
    evaluations: claimed evaluations of the denoiser a step; None: measured, not judged.
    exact_on_points: whether data that is one point is claimed to be met exactly.
    steps: the numbers of steps on grids uniform in log-SNR, at least two.

    `print` the report for its table; `.figures` holds "order", "weak order", "law error",
    "variance error" (on N(0.5, 0.4^2)), "evaluations", "one point", "batch", "precision",
    "non-finite", "at sigma 0", "stochastic" and "affine": None where one does not apply.
    """
    sampler = sampler if isinstance(sampler, Foreign) else foreign(sampler)
    counts = list(steps)
    if len(counts) < 2 or any(a >= b for a, b in zip(counts, counts[1:], strict=False)):
        raise ArgumentError(f"steps={steps!r} must be two or more increasing numbers of steps")
    report = Report(f"{sampler.name}: foreign sampler on {type(sampler.sde).__name__}")
    figures = report.figures
    figures |= {"claimed order": claimed_order, "order": None, "weak order": None}
    figures |= {"law error": None, "variance error": None, "stochastic": None, "affine": None}
    report.run("runs", partial(_runs, sampler, counts, figures))
    if {check.name for check in report.failures} - {"dtype"}:
        return report
    report.run("batch", partial(_batch, sampler, figures))
    report.run("evaluations", partial(_evaluations, sampler, evaluations, counts, figures))
    report.run("order", partial(_rms_order, sampler, claimed_order, counts, figures))
    report.run("weak order", partial(_weak_order, sampler, claimed_order, counts, figures))
    report.run("one-point data", partial(_one_point, sampler, exact_on_points, figures))
    for check in (_non_finite, _at_zero):
        report.run(check.__name__.strip("_").replace("_", " "), partial(check, sampler, figures))
    return report


# ---- what a run is given


def grid(sde: GaussianSDE, n: int) -> Tensor:
    """The test's times: uniform in log-SNR between fixed ends."""
    low, high = (float(sde.time_of_log_snr(torch.tensor(v))) for v in LOG_SNR)
    return log_snr(sde, n, t_max=min(low, sde.T), t_min=high)


def gaussians(sde: GaussianSDE, width: int = 4) -> GaussianData:
    """Means and variances off centre, from wide to narrow, N(0.5, 0.4^2) the first of them."""
    mean = torch.tensor([0.5, -1.0, 0.2, 1.0], dtype=DOUBLE)
    return GaussianData(sde, mean[:width], torch.tensor([0.16, 0.02, 1, 6], dtype=DOUBLE)[:width])


def _start(sde: GaussianSDE, rows: int = 64) -> Tensor:
    """States at the first time, the same rows whatever their number."""
    noise = torch.randn(64, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    return sde.prior(noise, grid(sde, 1)[0])[:rows]


def _mixture(sampler: Foreign, n: int, x: Tensor | None = None) -> Tensor:
    x = _start(sampler.sde) if x is None else x
    denoise = MixtureData.five(sampler.sde).denoise
    return run_on(sampler, denoise, x, grid(sampler.sde, n), Fixed())


# ---- the checks


def _runs(sampler: Foreign, counts: list[int], figures: dict[str, Any]) -> Iterator[Check]:
    """It returns a state, finite, a function of x_T and its noise alone; its precision."""
    x, noise, other = _start(sampler.sde), Fixed(), Fixed()
    ts, denoise = grid(sampler.sde, counts[0]), MixtureData.five(sampler.sde).denoise
    out = run_on(sampler, denoise, x, ts, noise)
    right = out.shape == x.shape and bool(out.isfinite().all())
    yield Check("runs", right, f"{counts[0]} steps give {tuple(out.shape)}, {out.dtype}")
    if not right:
        return
    wrong = noise.shapes - {tuple(x.shape)}
    yield Check(
        "noise",
        not wrong,
        f"draws shapes {sorted(wrong)} for states {tuple(x.shape)}"
        if wrong
        else f"{noise.draws} draws from torch",
    )
    gap = float((run_on(sampler, denoise, x, ts, other) - out).abs().max())
    yield Check(
        "repeats",
        gap == 0,
        "the same x_T and noise give the same samples"
        if gap == 0
        else f"a second run on the same x_T and noise differs by {gap:.1e}: state is kept between "
        "runs, or noise does not come from torch",
    )
    plain = run_on(sampler, denoise, x, ts, UnitVectors(*x.shape)) if not wrong else None
    figures["stochastic"] = plain is None or not torch.equal(plain, out)
    once, twice = (
        run_on(sampler, denoise, x * (1 + scale), ts, Fixed()).double() - out.double()
        for scale in (1e-9, 2e-9)
    )
    double = bool((twice - 2 * once).norm() < 1e-2 * twice.norm())
    figures["precision"] = "float64" if double else "float32"
    yield Check(
        "dtype",
        out.dtype == x.dtype,
        f"a {x.dtype} state gives {out.dtype}; it is computed in {figures['precision']}",
    )


def _rms_order(
    sampler: Foreign, claimed: float | None, counts: list[int], figures: dict[str, Any]
) -> Iterator[Check]:
    """RMS error on the mixture against the exact probability flow."""
    if figures["stochastic"]:
        return
    sde = sampler.sde
    process, x, ends = ReverseSDE(sde, MixtureData.five(sde), 0.0), _start(sde), grid(sde, 1)
    exact = integrate(process, x, ends, TorchDiffEq("dopri8", 1e-12, 1e-12)).x
    errors = [float((_mixture(sampler, n) - exact).square().mean().sqrt()) for n in counts]
    if not figures["evaluations"]:
        yield Check("error", claimed is None, f"{errors[-1]:.1e}; it chooses its own steps")
        return
    figures["order"] = asymptotic_order(dict(zip(counts, errors, strict=True)), _floor(figures))
    yield _order_check("order", claimed, figures["order"], errors, counts)


def _weak_order(
    sampler: Foreign, claimed: float | None, counts: list[int], figures: dict[str, Any]
) -> Iterator[Check]:
    """RMS of the errors of means and variances on Gaussians of several widths, exactly."""
    data, errors = gaussians(sampler.sde), []
    try:
        if figures["batch"] > _tolerance(figures):
            raise ArgumentError("samples depend on their batch mates")
        for n in counts:
            ts = grid(sampler.sde, n)
            mean, variance = output_law_of(sampler, ts, data)
            true_mean, true_variance = data.law(ts[-1])
            excess = variance / true_variance - 1
            off = torch.cat(((mean - true_mean) / true_variance.sqrt(), excess))
            errors.append(float(off.square().mean().sqrt()))
    except ArgumentError as error:
        figures["affine"] = False
        yield from _sampled_law(sampler, counts[-1], str(error))
        return
    figures["affine"] = True
    figures["law error"], figures["variance error"] = errors[-1], float(excess[0])
    figures["weak order"] = asymptotic_order(
        dict(zip(counts, errors, strict=True)), _floor(figures)
    )
    judged = claimed if figures["stochastic"] else None
    yield _order_check("weak order", judged, figures["weak order"], errors, counts)


def _sampled_law(sampler: Foreign, steps: int, why: str) -> Iterator[Check]:
    """Mean and variance of samples, where they cannot be read off."""
    ts, data = grid(sampler.sde, steps), gaussians(sampler.sde, 1)
    mean, variance = data.law(ts[0])
    start = torch.randn(SAMPLES, 1, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    out = run_on(sampler, data.denoise, mean + variance.sqrt() * start, ts).double()
    mean, variance = data.law(ts[-1])
    z = (out - mean) / variance.sqrt()
    off = abs(float(z.mean())) - LIMIT / SAMPLES**0.5
    wide = abs(float(z.var()) - 1) - LIMIT * (2 / SAMPLES) ** 0.5
    yield Check(
        "law, sampled",
        off < BIAS and wide < BIAS,
        f"mean {float(z.mean()):+.3f} (0), variance {float(z.var()):.3f} (1) of {SAMPLES} samples "
        f"in {steps} steps; a bias above {BIAS} fails, by chance once in 1.7 million. Not exact: "
        f"{why}",
    )


def _order_check(
    name: str, claimed: float | None, measured: float, errors: list[float], counts: list[int]
) -> Check:
    converges = measured > 0.5 or errors[-1] < 1e-6
    return Check(
        name,
        converges and (claimed is None or measured >= claimed - SLACK * (1 + claimed)),
        f"{measured:.2f} measured, "
        + (f"{claimed:g} claimed; errors " if claimed is not None else "none claimed; errors ")
        + ", ".join(f"{e:.1e}" for e in errors)
        + f" at {', '.join(map(str, counts))} steps",
    )


def _floor(figures: dict[str, Any]) -> float:
    """The error below which rounding may be what is seen."""
    return 1e-10 if figures["precision"] == "float64" else 3e-6


def _tolerance(figures: dict[str, Any]) -> float:
    """What two runs of the same samples may differ by."""
    return 1e-9 if figures["precision"] == "float64" else 1e-4


def _evaluations(
    sampler: Foreign, claimed: float | None, counts: list[int], figures: dict[str, Any]
) -> Iterator[Check]:
    """Evaluations of the denoiser a step, between two numbers of steps."""
    made = []
    for n in counts[:2]:
        calls = [0]

        def denoise(x: Tensor, t: Tensor, calls: list[int] = calls) -> Tensor:
            calls[0] += 1
            return MixtureData.five(sampler.sde).denoise(x, t)

        run_on(sampler, denoise, _start(sampler.sde), grid(sampler.sde, n), Fixed())
        made.append(calls[0])
    a_step = (made[1] - made[0]) / (counts[1] - counts[0])
    figures["evaluations"] = a_step
    yield Check(
        "evaluations",
        claimed is None or abs(a_step - claimed) < 1e-9,
        f"{a_step:g} a step, " + ("none claimed" if claimed is None else f"{claimed:g} claimed"),
    )


def _one_point(sampler: Foreign, exact: bool, figures: dict[str, Any]) -> Iterator[Check]:
    """Data that is one point: the law is N(alpha m, sigma^2) at every time, on any grid."""
    figures["one point"] = None
    if not figures["affine"]:
        return
    data = GaussianData(sampler.sde, torch.tensor([0.7]).double(), torch.zeros(1).double())
    ts = grid(sampler.sde, 18)
    mean, variance = output_law_of(sampler, ts, data)
    true_mean, true_variance = data.law(ts[-1])
    error = max(float((mean / true_mean - 1).abs()), float((variance / true_variance - 1).abs()))
    figures["one point"] = error
    kept = error < 1e-4  # tables are float32 here and there; a fault is percents
    yield Check(
        "one-point data",
        kept or not exact,
        ("kept exactly" if kept else f"off by {error:.1e}")
        + f" in 18 steps, {'claimed exact' if exact else 'none claimed'}",
    )


def _batch(sampler: Foreign, figures: dict[str, Any]) -> Iterator[Check]:
    """A sample is a function of its own start and noise, whoever its batch mates are."""
    x = _start(sampler.sde, 8)
    whole, few = _mixture(sampler, 20, x), _mixture(sampler, 20, x[:3])
    gap = float((whole[:3] - few).abs().max())
    figures["batch"] = gap
    yield Check(
        "batch",
        gap < _tolerance(figures),
        f"the first 3 of 8 differ by {gap:.1e} from 3 alone",
    )


def _non_finite(sampler: Foreign, figures: dict[str, Any]) -> Iterator[Check]:
    """A denoiser that breaks half-way: an error, or at least NaN in the samples."""
    ts = grid(sampler.sde, 20)
    data = MixtureData.five(sampler.sde)

    def broken(x: Tensor, t: Tensor) -> Tensor:
        made = data.denoise(x, t)
        return made * math.nan if float(torch.as_tensor(t).flatten()[0]) < float(ts[10]) else made

    try:
        out = run_on(sampler, broken, _start(sampler.sde, 4), ts, Fixed())
    except Endless as error:
        figures["non-finite"] = "endless"
        yield Check("non-finite", False, f"NaN of the denoiser: {error}")
        return
    except Exception as error:
        figures["non-finite"] = "raised"
        yield Check("non-finite", True, f"raised: {type(error).__name__}")
        return
    hidden = bool(out.isfinite().any())
    figures["non-finite"] = "hidden" if hidden else "returned"
    yield Check(
        "non-finite",
        not hidden,
        "NaN of the denoiser is lost: finite samples come back"
        if hidden
        else "NaN of the denoiser comes back as NaN, without an error",
    )


def _at_zero(sampler: Foreign, figures: dict[str, Any]) -> Iterator[Check]:
    """A grid that ends at sigma = 0: finite samples, or an error that says no."""
    figures["at sigma 0"] = None
    ts = torch.cat((grid(sampler.sde, 20), torch.zeros(1).double()))
    if float(sampler.sde.sigma(ts[-1])) != 0:
        return
    data = MixtureData.five(sampler.sde)
    try:
        out = run_on(sampler, data.denoise, _start(sampler.sde, 4), ts, Fixed())
    except Exception as error:
        figures["at sigma 0"] = "raised"
        yield Check("sigma = 0", True, f"refused: {type(error).__name__}: {error}".split("\n")[0])
        return
    finite = bool(out.isfinite().all())
    figures["at sigma 0"] = "finite" if finite else "not finite"
    yield Check("sigma = 0", finite, f"a grid that ends there gives {figures['at sigma 0']} states")
