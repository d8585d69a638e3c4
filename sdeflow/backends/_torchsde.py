"""A process as torchsde's methods see it: on a clock of unit intervals, with increments of ours.

Loaded only when a TorchSDE solver runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torchsde import BaseBrownian
from torchsde._core.base_sde import ForwardSDE
from torchsde._core.methods import select

from ..derivatives import columns, flat, own_slopes
from ..errors import PairingError
from ..noise import Noise, SeededNoise, area
from ..sde import SDE

Normals = Callable[[int, int], Tensor]
"""(interval, number of the draw) -> unit normals: the increment, its area, then fresh ones."""


def steps(
    process: SDE, x: Tensor, ts: Tensor, noise: Noise, method: str, calculus: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """The states of a run, each step made by torchsde's own method class."""
    clock = SteppedClock(process, x, ts, method, calculus)

    def normals(k: int, draw: int) -> Tensor:
        return (area if draw == 1 else _call)(noise, clock.t, clock.s)

    solver = select(method, calculus)(
        sde=ForwardSDE(clock),
        bm=Increments(clock, normals, gives_fresh(noise)),
        dt=1.0,
        adaptive=False,
        rtol=0.0,
        atol=0.0,
        dt_min=0.0,
        options=options(process, method),
    )
    y, extra = flat(x), None
    for k in range(len(ts) - 1):
        before = clock.h
        clock.enter(k)
        u = torch.tensor([k, k + 1], dtype=torch.float64)
        if extra is None:
            extra = solver.init_extra_solver_state(u[0], y)
        elif extra:
            extra = rescaled(extra, clock.h / before)
        y, extra = solver.step(u[0], u[1], y, extra)
        yield ts[k + 1], y.reshape(x.shape)


def _call(noise: Noise, t: Tensor, s: Tensor) -> Tensor:
    return noise(t, s)


def rescaled(extra: tuple[Tensor, ...], ratio: Tensor) -> tuple[Tensor, ...]:
    """What reversible Heun carries over, f h and g sqrt|h| and a state, for an interval whose h is
    `ratio` times the last."""
    f, g, z = extra
    return f * ratio, g * ratio.sqrt(), z


def options(process: SDE, method: str) -> dict[str, bool]:
    """Scalar noise: the derivative of Milstein's scheme by a difference along g. The library's own
    derivative is g (dg)^T there, where (dg) g belongs."""
    scalar = process.noise == "scalar" and not process.additive
    return {"grad_free": True} if method == "milstein" and scalar else {}


def check_own(process: SDE, x: Tensor, t: Tensor, method: str) -> None:
    """Refuse elementwise noise whose g_i looks at other components than x_i."""
    if process.noise != "elementwise" or process.additive:
        return
    if own_slopes(lambda y: process.diffusion(y, t).expand(y.shape), x, False) is None:
        raise PairingError(
            f"torchsde's {method} takes elementwise noise whose g_i looks at x_i alone, and here "
            "it looks at other components: use TorchSDE('heun') or TorchSDE('midpoint'), or "
            "EulerMaruyama()"
        )


class Clock:
    """A process as the SDE on the clock u that has f~(u) = f(t) h_k and g~(u) = g(t) sqrt|h_k| on
    k <= u <= k + 1, where t = t_k + (u - k) h_k. Interval k is the current one, whatever u is.

    torchsde's states are (B, d): states are flattened on the way in and shaped on the way out.
    """

    differentiable = False

    def __init__(self, process: SDE, x: Tensor, ts: Tensor, method: str, calculus: str) -> None:
        self.process, self.shape, self.ts = process, x.shape, ts.unbind()
        self.sde_type = calculus
        self.noise_type = {"elementwise": "diagonal", "scalar": "scalar", "matrix": "general"}[
            process.noise
        ]
        if process.additive and process.noise != "elementwise":
            self.noise_type = "additive"
        self.enter(0)

    def enter(self, k: int) -> None:
        """Make k the current interval."""
        self.k, self.t, self.s = k, self.ts[k], self.ts[k + 1]
        self.h = self.s - self.t
        self.root = self.h.abs().sqrt()
        self._drifts: list[tuple[float, Tensor, Tensor]] = []

    def time(self, u: Tensor) -> Tensor:
        """t(u)."""
        part = float(u) - self.k
        return self.s if part == 1 else self.t + part * self.h

    def f(self, u: Tensor, y: Tensor) -> Tensor:
        """h f(x, t), (B, d). A stage that asks twice for the same drift is answered once (but where
        a graph would be shared, unless it belongs to the run)."""
        recall = self.differentiable or not torch.is_grad_enabled()
        for known_u, known_y, drift in self._drifts if recall else ():
            if known_y is y and known_u == float(u):
                return drift
        drift = self.h * flat(self.process.drift(y.reshape(self.shape), self.time(u)))
        if recall:
            self._drifts.append((float(u), y, drift))
        return drift

    def g(self, u: Tensor, y: Tensor) -> Tensor:
        """sqrt|h| g(x, t): (B, d) for elementwise noise, (B, d, m) for any other."""
        x = y.reshape(self.shape)
        g = self.process.diffusion(x, self.time(u)).to(device=y.device, dtype=y.dtype)
        if self.process.noise == "elementwise":
            return self.root * flat(g.expand(self.shape))
        return self.root * columns(g, self.process.noise, x)


class SteppedClock(Clock):
    """A clock for steps made one by one: it offers products with g, which torchsde's drivers would
    try out on draws from torch's global generator."""

    differentiable = True

    def __init__(self, process: SDE, x: Tensor, ts: Tensor, method: str, calculus: str) -> None:
        super().__init__(process, x, ts, method, calculus)
        if process.additive and method in ("srk", "milstein"):
            # The additive scheme of srk makes 2 drift evaluations a step, the diagonal one 4.
            self.noise_type = "additive"

    def g_prod(self, u: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """sqrt|h| G(x, t) v, (B, d)."""
        g = self.g(u, y)
        return g * v if g.ndim == 2 else (g @ v.unsqueeze(-1)).squeeze(-1)


class Increments(BaseBrownian):
    """The Wiener increment W of each unit interval, its time integral U and its Levy area A.

    W = z,   U = W/2 + H,   H = zeta/sqrt(12)
    A_kl = 1/2 INT W_k dW_l - W_l dW_k = H_k W_l - W_k H_l + sqrt(1/20 + (H_k^2 + H_l^2)/5) n_kl

    W and U have their exact joint law. A has its exact mean and variance given the two; the n_kl =
    -n_lk are fresh normals, or zero where the source has none to give (see `gives_fresh`).
    Source: Davie (2014); Foster, Lyons & Oberhauser (2020) for the variance.
    """

    levy_area_approximation = "foster"

    def __init__(self, clock: Clock, normals: Normals, fresh: bool) -> None:
        super().__init__()
        self._clock, self._normals, self._fresh = clock, normals, fresh
        self._held: tuple[int, dict[int, Tensor]] = (-1, {})

    def __call__(
        self,
        ta: Tensor,
        tb: Tensor | None = None,
        return_U: bool = False,
        return_A: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        k = round(float(ta))
        if k != self._clock.k:
            self._clock.enter(k)
        w = self._draw(k, 0)
        if return_U:
            return w, w / 2 + self._draw(k, 1) / 12**0.5
        if return_A:
            return w, self._area(k, w)
        return w

    def _draw(self, k: int, draw: int) -> Tensor:
        if self._held[0] != k:
            self._held = (k, {})
        held = self._held[1]
        if draw not in held:
            held[draw] = flat(self._normals(k, draw))
        return held[draw]

    def _area(self, k: int, w: Tensor) -> Tensor:
        m = w.shape[1]
        if self._clock.noise_type != "general" or m == 1:  # it would multiply zero
            return w.new_zeros(*w.shape, m)
        first = self._draw(k, 1)[:, :, None] / 12**0.5
        mean = first * w[:, None, :]
        mean = mean - mean.mT
        if not self._fresh:
            return mean
        n = torch.cat([self._draw(k, 2 + j) for j in range(more_draws(m))], 1)
        row, column = torch.triu_indices(m, m, 1, device=w.device)
        rest = w.new_zeros(*w.shape, m)
        rest[:, row, column] = n[:, : len(row)]
        rest = rest * (1 / 20 + (first**2 + first.mT**2) / 5).sqrt()
        return mean + rest - rest.mT

    def __repr__(self) -> str:
        return f"{type(self).__name__}(interval={self._clock.k})"

    @property
    def dtype(self) -> torch.dtype:
        return self._draw(self._clock.k, 0).dtype

    @property
    def device(self) -> torch.device:
        return self._draw(self._clock.k, 0).device

    @property
    def shape(self) -> torch.Size:
        return self._draw(self._clock.k, 0).shape


def gives_fresh(noise: Noise) -> bool:
    """Whether a source answers the same question anew each time. A first-class path does not: there
    the mean of A given W and H is used alone, which is also the nearest to the path's true area."""
    source = getattr(noise, "source", noise)
    return isinstance(source, SeededNoise) or not hasattr(source, "area")


def more_draws(m: int) -> int:
    """How many draws of m normals make the m (m - 1)/2 that a Levy area takes."""
    return m // 2
