"""`check_sde`: whether an SDE keeps its word, and its drift and diffusion fit its kernel."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..derivatives import slope
from ..detect import example_shape, state_shape
from ..errors import SdeflowError
from ..reverse import ReverseSDE
from ..sde import SDE, GaussianSDE, as_time, match
from ..system import LinearSystem
from .contract import CLOSE, Group, agree, contract, describes, gap, moments, states
from .problems import GaussianData
from .report import Check, Report
from .transitions import transitions

DOUBLE = torch.float64
TOLERANCE = 1e-6
"""Relative agreement of rates with the slopes of alpha and sigma."""


def check_sde(sde: SDE, x: Tensor | Sequence[int] | None = None) -> Report:
    """A report on `sde`: does it keep the contract of its class, and do its parts agree?

        print(check_sde(MySDE()))            # the table
        check_sde(MySDE()).raise_if_failed()

    Every SDE: shapes for times () and (B,), dtypes, samples kept apart, `noise`, `additive`,
    `commutative`, `divergence`, `spread`. A `GaussianSDE`: drift, diffusion and rates against alpha
    and sigma, with the time, the ratio and a guess at the cause; slopes, perturb, posterior, prior,
    log-SNR and its inverse, the reversed process; again at T = 1 and T = 5 where T is a field. A
    `LinearSystem`: its kernel against the moment equations.

    x: an example state (B, *), or the shape of one; see `gaussian`.
    """
    try:
        shape = _shape(sde, x)
    except SdeflowError as error:
        return Report(repr(sde), [Check("runs", False, str(error))])
    report = Report(f"{sde!r}: {describes(sde)}, states (B, {', '.join(map(str, shape))})")
    for name, group in contract(sde, shape):
        report.run(name, group)
    if isinstance(sde, GaussianSDE):
        for name, check in _gaussian(sde, shape):
            report.run(name, check)
        for other in _at_other_T(sde):
            report.checks += _summary(other, shape)
    if isinstance(sde, LinearSystem):
        for name, check in transitions(sde, shape):
            report.run(name, check)
    return report


def _shape(sde: SDE, x: Tensor | Sequence[int] | None) -> tuple[int, ...]:
    if x is not None:
        return state_shape(x)
    if isinstance(sde, GaussianSDE):
        t = as_time(0.4 * sde.T)
        return tuple(sde.alpha(t).shape) or (3,)
    if isinstance(sde, LinearSystem):
        return (sde.transition(sde.T / 2).matrix.shape[-1],)
    return example_shape(sde)


def _at_other_T(sde: GaussianSDE) -> Iterator[GaussianSDE]:
    """The same SDE at T = 1 and T = 5, where T is a field of it and it goes that far."""
    if not (dataclasses.is_dataclass(sde) and any(f.name == "T" for f in dataclasses.fields(sde))):
        return
    for T in (1.0, 5.0):
        try:
            other = dataclasses.replace(sde, T=T)
        except SdeflowError:
            continue
        if T != sde.T and _positive(other).passed:
            yield other


def _summary(sde: GaussianSDE, shape: tuple[int, ...]) -> list[Check]:
    """What fails at another T, or that nothing does."""
    report = Report("")
    for name, check in _gaussian(sde, shape):
        report.run(name, check)
    label = f" (T = {sde.T:g})"
    if report.ok:
        return [Check("all of these" + label, True, f"{len(report.checks)} checks")]
    return [check._replace(name=check.name + label) for check in report.failures]


def _gaussian(sde: GaussianSDE, shape: tuple[int, ...]) -> Iterator[Group]:
    x = states(shape)
    yield "schedule", lambda: _schedule(sde)
    yield "rates", lambda: _rates(sde, x)
    yield "slopes", lambda: [_slopes(sde)]
    yield "perturb", lambda: _perturb(sde, x)
    yield "posterior", lambda: [_posterior(sde, x, eta) for eta in (0.0, 0.5, 1.0)]
    yield "log_snr", lambda: _log_snr(sde)
    yield "reversal", lambda: [_reversal(sde, x, eta) for eta in (0.0, 0.5, 1.0)]


def _schedule(sde: GaussianSDE) -> list[Check]:
    """alpha(0) = 1, sigma(0) = 0, and one number a time."""
    zero, times = torch.zeros((), dtype=DOUBLE), moments(sde, 5)
    a, s = sde.alpha(zero), sde.sigma(zero)
    checks = [
        _positive(sde),
        Check("alpha(0) = 1", gap(a, torch.ones(())) <= 1e-9, f"alpha(0) = {_show(a)}"),
        Check("sigma(0) = 0", bool((s.abs() <= 1e-9 * sde.sigma(times).abs().amax()).all()),
              f"sigma(0) = {_show(s)}"),
    ]  # fmt: skip
    for name in ("alpha", "sigma"):
        schedule = getattr(sde, name)
        each = torch.stack([schedule(t) for t in times])
        together = schedule(times)
        good = together.shape == each.shape and gap(together, each) <= CLOSE
        rule = f"shape {tuple(together.shape)} for t of shape (5,), {tuple(each.shape[1:])} for ()"
        checks.append(Check(f"{name}: t (B,)", good, rule))
    return checks


def _positive(sde: GaussianSDE) -> Check:
    times = moments(sde, 40)
    for t in times:
        a, s = sde.alpha(t), sde.sigma(t)
        if not bool(((a > 0) & (s > 0) & a.isfinite() & s.isfinite()).all()):
            told = f"at t = {float(t):.4g} alpha is {_show(a)} and sigma {_show(s)}"
            return Check("alpha, sigma > 0", False, told)
    return Check("alpha, sigma > 0", True, "inside (0, T)")


def _rates(sde: GaussianSDE, x: Tensor) -> list[Check]:
    """f and g^2, by three roads, against the slopes of alpha and sigma."""
    times = moments(sde, 16)

    def exact(t: Tensor) -> tuple[Tensor, Tensor]:
        s = sde.sigma(t)
        f = slope(sde.alpha, t) / sde.alpha(t)
        return f, 2 * s * (slope(sde.sigma, t) - f * s)

    f, g2 = exact(times)
    mirrored_f, mirrored_g2 = exact(sde.T - times)
    one = torch.ones_like(x)
    drift = torch.cat([_first(sde.drift(one, t), f) for t in times])
    g = torch.cat([_first(sde.diffusion(one, t) * one, f) for t in times])
    own_f, own_g2 = sde.rates(times)
    off_f = partial(_ratio, "f", times, f, mirrored_f, sde.T, g2)
    off_g2 = partial(_ratio, "g^2", times, g2, mirrored_g2, sde.T, g2)
    return [
        off_f("drift", drift),
        off_g2("diffusion", g**2),
        off_f("rates: f", own_f),
        off_g2("rates: g^2", own_g2),
    ]


def _first(value: Tensor, like: Tensor) -> Tensor:
    """The coefficient in a value (B, *) at x = 1, of the shape of the schedule."""
    return (
        value[:1].reshape(1, -1)[:, 0] if like.ndim == 1 else value[:1].expand(1, *like.shape[1:])
    )


def _ratio(
    symbol: str,
    times: Tensor,
    wanted: Tensor,
    mirrored: Tensor,
    T: float,
    size: Tensor,
    name: str,
    got: Tensor,
) -> Check:
    """A coefficient against that of alpha and sigma: where, by how much, and why perhaps."""
    off = (got - wanted).abs() > TOLERANCE * torch.maximum(wanted.abs(), 1e-6 * size.abs())
    off |= ~got.isfinite()
    if not bool(off.any()):
        return Check(name, True, f"{symbol} is that of alpha and sigma")
    worst = int(off.reshape(len(times), -1).sum(0).argmax())  # the component
    where, got, wanted, mirrored = (
        v.reshape(len(times), -1)[:, worst] for v in (off, got, wanted, mirrored)
    )
    ratio = got / wanted
    k = int(where.nonzero()[0])
    r, t = float(ratio[k]), float(times[k])
    steady = bool(((ratio - r).abs() <= 1e-5 * abs(r)).all())
    if steady:
        story = f"{symbol} is {r:.4g} times that of alpha and sigma at t = {t:.4g}, and at all t"
    else:
        last = int(where.nonzero()[-1])
        story = (
            f"{symbol} is {r:.4g} times that of alpha and sigma at t = {t:.4g} and "
            f"{float(ratio[last]):.4g} times at t = {float(times[last]):.4g}"
        )
    cause = _cause(symbol, r if steady else math.nan, times, got, wanted, mirrored, T)
    return Check(name, False, story + (f": {cause}" if cause else ""))


def _cause(
    symbol: str, r: float, times: Tensor, got: Tensor, wanted: Tensor, mirrored: Tensor, T: float
) -> str:
    """A guess at what went wrong."""

    def same(a: Tensor, b: Tensor) -> bool:
        return gap(a, b) <= 1e-5 and bool(((a - b).abs() <= 1e-4 * b.abs()).all())

    factors = {
        -1.0: "the sign is wrong",
        2.0: "a factor of 2 too many",
        0.5: "a factor of 2 is missing",
        4.0: "a factor of 2 too many in g" if symbol == "g^2" else "a factor of 4 too many",
        0.25: "a factor of 2 is missing in g" if symbol == "g^2" else "a factor of 4 is missing",
        T: "a factor of T too many",
        1 / T: "a factor of T is missing",
        T**2: "a factor of T too many, squared",
        1 / T**2: "a factor of T is missing, squared",
    }
    for factor, cause in factors.items():
        if abs(r - factor) <= 1e-4 * abs(factor) and factor != 1:
            both = factor in (2.0, 0.5, 4.0, 0.25) and T in (2.0, 4.0, 0.5, 0.25)
            return cause + (f" (or a factor of T = {T:g})" if both else "")
    if symbol == "g^2" and same(got, wanted**2):
        return "a square root is missing: the diffusion is g, not g^2"
    if symbol == "g^2" and same(got**2, wanted):
        return "a square root too many: the diffusion is g, not sqrt(g)"
    if same(got, mirrored):
        return "time runs the wrong way, T - t where t belongs"
    for power, story in ((1.0, "a factor of t too many"), (-1.0, "a factor of t is missing")):
        scaled = got / (wanted * times**power)
        if same(scaled, scaled[:1].expand_as(scaled)):
            return story
    return ""


def _slopes(sde: GaussianSDE) -> Check:
    def pairs() -> Iterator[tuple[Tensor, Tensor, float]]:
        for t in moments(sde):
            for own, schedule in zip(sde.slopes(t), (sde.alpha, sde.sigma), strict=True):
                yield own, slope(schedule, t), float(t)

    return agree("slopes", pairs(), "the derivatives of alpha and sigma")


def _perturb(sde: GaussianSDE, x: Tensor) -> list[Check]:
    z = states(x.shape[1:]).flip(0) - 1

    def pairs() -> Iterator[tuple[Tensor, Tensor, float]]:
        for t in moments(sde):
            a, s = match(sde.alpha(t), x, t), match(sde.sigma(t), x, t)
            yield sde.perturb(x, t, z), a * x + s * z, float(t)

    def priors() -> Iterator[tuple[Tensor, Tensor, float]]:
        for t in (float(sde.T), 0.6 * float(sde.T)):
            yield sde.prior(z, t), match(sde.sigma(as_time(t)), z, as_time(t)) * z, t
        yield sde.prior(z), sde.prior(z, sde.T), float(sde.T)

    return [
        agree("perturb", pairs(), "alpha x_0 + sigma noise"),
        agree("prior", priors(), "sigma_T noise"),
    ]


def _posterior(sde: GaussianSDE, x0: Tensor, eta: float) -> Check:
    """With x_t drawn from the kernel, x_s has the kernel's law; at eta = 1 by Bayes's rule, and
    eta scales the standard deviation."""

    def pairs() -> Iterator[tuple[Tensor, Tensor, float]]:
        for t in moments(sde):
            for u in (0.3, 0.9):
                s = u * t
                (a_t, s_t), (a_s, s_s) = sde.kernel(x0, t), sde.kernel(x0, s)
                middle, std = sde.posterior(a_t * x0, x0, t, s, eta)
                high, _ = sde.posterior(a_t * x0 + s_t, x0, t, s, eta)
                gain = high - middle  # times the standard deviation of x_t
                yield middle, a_s * x0, float(t)
                yield gain**2 + std**2, s_s**2 * torch.ones_like(x0), float(t)
                kept = (a_t * s_s / (a_s * s_t)) ** 2
                yield 1 + (std / s_s) ** 2, 1 + eta**2 * (1 - kept), float(t)
                if eta == 1:
                    bayes = (a_t / a_s) * (s_s / s_t) * torch.ones_like(x0)
                    yield 1 + gain / s_s, 1 + bayes, float(t)

    return agree(f"posterior, eta = {eta:g}", pairs(), "the kernel's law at s")


def _log_snr(sde: GaussianSDE) -> list[Check]:
    t = moments(sde, 12)
    own = sde.log_snr(t)
    exact = 2 * (sde.alpha(t).log() - sde.sigma(t).log())
    fits = gap(own, exact) <= CLOSE
    falls = bool((own.diff(dim=0) < 0).all())
    checks = [
        Check("log_snr", fits, f"2 log(alpha/sigma) to {gap(own, exact):.0e}"),
        Check("log_snr falls", falls, "" if falls else "it rises somewhere: noise must only grow"),
    ]
    if own.shape == t.shape and falls:
        back = sde.time_of_log_snr(own)
        off = ((back - t).abs() / t).nan_to_num(nan=math.inf)
        k = int(off.argmax())
        told = f"finds {float(back[k]):.6g} for t = {float(t[k]):.6g}"
        good = float(off.max()) <= 1e-7
        told = f"finds t to {float(off.max()):.0e}" if good else told
        checks.append(Check("time_of_log_snr", good, told))
    return checks


def _reversal(sde: GaussianSDE, x: Tensor, eta: float) -> Check:
    """On Gaussian data the reversed process has the marginals of the forward one.

    Mean m and variance v of x_t obey m' = b(m), v' = 2 b'(m) v - eta^2 g^2 for a process of drift
    b(x) run down in time; from the score alone, and from the denoiser.
    """
    mean, variance = x[0] - 1, 0.3 + x[1] ** 2
    data = GaussianData(sde, mean, variance)

    def law(t: Tensor) -> tuple[Tensor, Tensor]:
        a, s = sde.kernel(mean[None], t)
        return a * mean, a * a * variance + s * s

    def pairs() -> Iterator[tuple[Tensor, Tensor, float]]:
        for t in moments(sde):
            a, s = sde.kernel(mean[None], t)
            da, ds = (match(slope(v, t), mean[None], t) for v in (sde.alpha, sde.sigma))
            m, v = law(t)
            grown = 2 * a * da * variance + 2 * s * ds
            g2 = 2 * s * (ds - da / a * s)
            size = g2 / v.sqrt()  # of a drift; alpha may be nothing by now
            for score in (data, lambda y, t: data(y, t)):
                process = ReverseSDE(sde, score, eta)
                here = m.expand(2, *mean.shape)
                b = process.drift(here, t)[0]
                tilt = process.drift(here + 1, t)[0] - b
                noise = (process.diffusion(here, t) * torch.ones_like(here))[0] ** 2
                yield 1 + b / size, 1 + da * mean / size, float(t)
                yield 1 + (2 * tilt * v - noise) / g2, 1 + grown / g2, float(t)

    return agree(f"reversal, eta = {eta:g}", pairs(), "the marginals of Gaussian data")


def _show(value: Any) -> str:
    values = torch.as_tensor(value).reshape(-1)
    return f"{float(values[0]):.6g}" if len(values) == 1 else f"{values.tolist()}"
