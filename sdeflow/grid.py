"""Time grids: plain functions (sde, n) -> n + 1 decreasing times, float64 on the host.

A grid runs from `t_max` (the SDE's T) down to `t_min` (the SDE's t_min); with `to_zero` its n-th
and last step goes on to t = 0, where sigma = 0. (The discrete spacings visit the times of a
model's training, which begin and end where they do.) Any grid serves any solver.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import ArgumentError, GridError, did_you_mean, positive_int
from .sde import SDE, GaussianSDE, single_log_snr

Shape = Callable[..., Tensor]


class Grid(Protocol):
    """A grid: `grid(sde, n, t_max=None, t_min=None, to_zero=False, **options)`."""

    def __call__(self, sde: SDE, n: int, **options: Any) -> Tensor: ...


def grid(shape: Shape) -> Grid:
    """Make a grid of shape(sde, t_max, t_min, u, **options), u = 0, 1/n, ..., 1."""

    options_of_shape = [
        parameter
        for parameter in inspect.signature(shape).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    known = [parameter.name for parameter in options_of_shape]

    def build(
        sde: SDE,
        n: int,
        *,
        t_max: float | None = None,
        t_min: float | None = None,
        to_zero: bool = False,
        **options: Any,
    ) -> Tensor:
        n = positive_int("steps", n)
        for option in options:
            if option not in known:
                raise ArgumentError(
                    f"grid {build.__name__!r} has no option {option!r}"
                    f"{did_you_mean(option, [*known, 't_max', 't_min', 'to_zero'])}"
                )
        high = sde.T if t_max is None else float(t_max)
        low = getattr(sde, "t_min", 0.0) if t_min is None else float(t_min)
        if not 0 <= low < high <= sde.T:
            raise GridError(
                f"t_min={low!r} and t_max={high!r} must obey 0 <= t_min < t_max <= T = {sde.T!r}"
            )
        steps = n - 1 if to_zero and low > 0 else n
        ends = torch.tensor([high, low], dtype=torch.float64)
        times = ends[:1]
        if steps:
            u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
            times = shape(sde, ends[0], ends[1], u, **options).clone()
            times[0], times[-1] = high, low
        if steps < n:
            times = torch.cat((times, torch.zeros(1, dtype=torch.float64)))
        return check_grid(times)

    # What the grid is called and takes is told by the shape's name, docstring and options.
    signature = inspect.signature(build)
    common = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    build.__signature__ = signature.replace(parameters=common + options_of_shape)  # type: ignore[attr-defined]
    build.__annotations__ |= {p.name: p.annotation for p in options_of_shape}
    build.__name__, build.__doc__ = shape.__name__, shape.__doc__
    build.__qualname__, build.__module__ = shape.__qualname__, shape.__module__
    return build


@grid
def uniform(sde: SDE, t_max: Tensor, t_min: Tensor, u: Tensor) -> Tensor:
    """Uniform in t. Source: Song et al. (2021, Score-SDE)."""
    return t_max + u * (t_min - t_max)


@grid
def quadratic(sde: SDE, t_max: Tensor, t_min: Tensor, u: Tensor) -> Tensor:
    """Uniform in sqrt(t): finer near the data. Source: Song et al. (2021, DDIM), appendix D.2."""
    return (t_max**0.5 + u * (t_min**0.5 - t_max**0.5)) ** 2


@grid
def karras(sde: SDE, t_max: Tensor, t_min: Tensor, u: Tensor, *, rho: float = 7.0) -> Tensor:
    """Uniform in (sigma/alpha)^(1/rho). Source: Karras et al. (2022, EDM), eq. 5."""
    if not rho > 0:
        raise ArgumentError(f"rho={rho!r} must be > 0; EDM uses 7")
    low, high = (torch.exp(-log_snr / (2 * rho)) for log_snr in _log_snr_ends(sde, t_max, t_min))
    return _gaussian(sde).time_of_log_snr(-2 * rho * torch.log(high + u * (low - high)))


@grid
def log_snr(sde: SDE, t_max: Tensor, t_min: Tensor, u: Tensor) -> Tensor:
    """Uniform in log(alpha/sigma). Source: Lu et al. (2022, DPM-Solver), section 3.3."""
    low, high = _log_snr_ends(sde, t_max, t_min)
    return _gaussian(sde).time_of_log_snr(high + u * (low - high))


def _discrete(spacing: str) -> Callable[..., Tensor]:
    """The times of a model trained at M discrete steps, thinned to n of them.

    Step i of 0 ... M-1 sits at time (i + 1) T/M; the last step goes to t = 0. Exactly n of the M
    steps are visited: at i = k floor(M/n) (leading), the integers nearest to a division of
    [0, M-1] (linspace), or counted back from M by M/n (trailing).
    """

    def build(sde: SDE, n: int, *, train_steps: int = 1000, to_zero: bool = True) -> Tensor:
        n, m = positive_int("steps", n), positive_int("train_steps", train_steps)
        if n > m:
            raise GridError(f"steps={n} must be at most train_steps={m} for a discrete grid")
        k = torch.arange(n, dtype=torch.float64)
        index = {
            "leading": (k * (m // n)).flip(0),
            "linspace": torch.linspace(0, m - 1, n, dtype=torch.float64).round().flip(0)
            if n > 1
            else torch.tensor([m - 1.0], dtype=torch.float64),
            "trailing": (m - k * m / n).round() - 1,
        }[spacing]
        times = (index + 1) * (sde.T / m)
        end = 0.0 if to_zero else min(getattr(sde, "t_min", 0.0), float(times[-1]) / 2)
        return check_grid(torch.cat((times, torch.tensor([end], dtype=torch.float64))))

    build.__name__ = spacing
    build.__doc__ = (
        f"{spacing.capitalize()} spacing of discrete DDPM time (train_steps = 1000), then t = 0. "
        f"Source: Lin et al. (2024), table 2.\n{_discrete.__doc__}"
    )
    return build


leading = _discrete("leading")
linspace = _discrete("linspace")
trailing = _discrete("trailing")

GRIDS: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform,
    "quadratic": quadratic,
    "karras": karras,
    "log_snr": log_snr,
    "leading": leading,
    "linspace": linspace,
    "trailing": trailing,
}


def check_grid(ts: Any) -> Tensor:
    """ts as a strictly monotone (N+1,) float64 tensor on the host, or an error naming the place."""
    try:
        times = torch.as_tensor(ts, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise GridError(f"ts={ts!r} must be times, such as grid.karras(sde, 20)") from error
    if times.ndim != 1 or len(times) < 2:
        raise GridError(f"ts has shape {tuple(times.shape)}; it must be (N+1,), at least two times")
    low, high = map(float, times.diff().aminmax())
    first, last = float(times[0]), float(times[-1])
    if (low > 0 and 0 <= first and last < math.inf) or (high < 0 <= last and first < math.inf):
        return times  # a NaN compares false; what is wrong, and where, is found number by number
    values = times.tolist()
    for k, value in enumerate(values):
        if not 0 <= value < math.inf:
            raise GridError(f"ts[{k}]={value} must be a finite time >= 0; data sit at t = 0")
    down = values[-1] < values[0]
    for k, (t, s) in enumerate(itertools.pairwise(values)):
        if (s >= t) if down else (s <= t):
            raise GridError(
                f"ts must be strictly monotone; ts[{k}]={t!r} is followed by ts[{k + 1}]={s!r}"
            )
    return times


def intervals(ts: Tensor) -> Iterator[tuple[Tensor, Tensor, float, float]]:
    """(t, s, h, sqrt|h|), h = s - t, for every step of a grid: 0-dim times and numbers.

    They are made some at a time, so that a long grid takes no room.
    """
    for k in range(0, len(ts) - 1, 256):
        part = ts[k : k + 257]
        times, h = part.unbind(0), part.diff()
        yield from zip(times, times[1:], h.tolist(), h.abs().sqrt().tolist(), strict=False)


def _gaussian(sde: SDE) -> GaussianSDE:
    if not isinstance(sde, GaussianSDE):
        raise GridError(
            f"this grid needs log-SNR, which {type(sde).__name__} has not; use the grid 'uniform'"
        )
    return sde


def _log_snr_ends(sde: SDE, t_max: Tensor, t_min: Tensor) -> tuple[Tensor, Tensor]:
    """(log-SNR at t_min, at t_max), both finite.

    Where alpha(t_max) = 0, as at the end of a rectified flow, it is taken at 0.999 t_max; the
    grid still begins at t_max.
    """
    low, high = single_log_snr(_gaussian(sde), torch.stack((t_min, t_max)))
    if high == -math.inf:
        high = _gaussian(sde).log_snr(0.999 * t_max)
    if not (low.isfinite() and high.isfinite()):
        raise GridError(
            f"log-SNR is {float(low)} at t_min={float(t_min)!r} and {float(high)} at "
            f"t_max={float(t_max)!r}; this grid needs both finite: keep t_min > 0, and give "
            "to_zero=True for a last step to t = 0"
        )
    return low, high
