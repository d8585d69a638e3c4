"""One step of a torchsde method on the unit interval. Loaded only when a TorchSDE solver runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torchsde import BaseBrownian
from torchsde._core.base_sde import ForwardSDE
from torchsde._core.methods import select

from .noise import Noise
from .sde import SDE


class UnitInterval:
    """A process on one grid interval, as the SDE on u in [0, 1] that torchsde's methods step.

    torchsde states are (B, d): states are flattened on the way in and shaped on the way out.
    """

    def __init__(self, process: SDE, x: Tensor, noise: Noise, method: str, calculus: str) -> None:
        self.process, self.shape = process, x.shape
        self.sde_type = calculus
        if process.noise == "matrix":
            self.noise_type = "general"
        else:
            # The additive scheme of srk makes 2 drift evaluations a step, the diagonal one 4.
            plain = method in ("srk", "milstein") and process.additive
            self.noise_type = "additive" if plain else "diagonal"
        self.increments = _Increments(process, x, noise)
        self.method = select(method, calculus)(
            sde=ForwardSDE(self),
            bm=self.increments,
            dt=1.0,
            adaptive=False,
            rtol=0.0,
            atol=0.0,
            dt_min=0.0,
            options={},
        )
        self.t = self.h = torch.zeros((), dtype=torch.float64)
        self._drifts: list[tuple[float, Tensor, Tensor]] = []
        self._extra: tuple[Tensor, ...] | None = None

    def step(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """x at s from x at t."""
        before, self.t, self.h = self.h, t, s - t
        self.increments.begin(t, s)
        self._drifts.clear()
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        y = _flat(x)
        if self._extra is None:
            self._extra = self.method.init_extra_solver_state(zero, y)
        elif self._extra:  # reversible Heun carries f and g over, in units of the last interval
            ratio = self.h / before
            f, g, z = self._extra
            self._extra = (f * ratio, g * ratio.abs().sqrt(), z)
        y, self._extra = self.method.step(zero, one, y, self._extra)
        return y.reshape(self.shape)

    def f(self, u: Tensor, y: Tensor) -> Tensor:
        """h f(x, t); a stage that asks twice for the same drift is answered once."""
        for known_u, known_y, drift in self._drifts:
            if known_y is y and known_u == float(u):
                return drift
        drift = self.h * _flat(self.process.drift(y.reshape(self.shape), self.t + u * self.h))
        self._drifts.append((float(u), y, drift))
        return drift

    def g(self, u: Tensor, y: Tensor) -> Tensor:
        """sqrt(|h|) g(x, t): (B, d), or (B, d, m) for matrix noise."""
        x = y.reshape(self.shape)
        g = self.h.abs().sqrt() * self.process.diffusion(x, self.t + u * self.h)
        if self.noise_type == "general":
            return g.reshape(y.shape[0], -1, g.shape[-1])
        return _flat(g.to(device=y.device, dtype=y.dtype).expand(self.shape))

    def g_prod(self, u: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """sqrt(|h|) G(x, t) v."""
        g = self.g(u, y)
        return (g @ v.unsqueeze(-1)).squeeze(-1) if self.noise_type == "general" else g * v


def _flat(x: Tensor) -> Tensor:
    """(B, d): the state that torchsde knows, of states of any rank."""
    return x.unsqueeze(1) if x.ndim == 1 else x.flatten(1)


class _Increments(BaseBrownian):
    """The Wiener increment of the current interval, in units of sqrt(|h|), with its time integral.

    U, the integral of W over the interval, is normal with Var U = 1/3 and Cov(W, U) = 1/2.
    """

    levy_area_approximation = "foster"

    def __init__(self, process: SDE, x: Tensor, noise: Noise) -> None:
        super().__init__()
        self._noise, self._x = noise, x
        self._size = process.noise_shape(x).numel() // max(x.shape[0], 1)

    def begin(self, t: Tensor, s: Tensor) -> None:
        self._t, self._s = t, s
        self._w = _flat(self._noise(t, s))
        self._u: Tensor | None = None

    def __call__(
        self,
        ta: Tensor,
        tb: Tensor | None = None,
        return_U: bool = False,
        return_A: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        if return_U:
            if self._u is None:
                other = _flat(self._noise(self._t, self._s))
                self._u = self._w / 2 + other / 12**0.5
            return self._w, self._u
        if return_A:  # multiplies the derivative of g, which is zero for additive noise
            return self._w, self._w.new_zeros(*self._w.shape, self._size)
        return self._w

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape})"

    @property
    def dtype(self) -> torch.dtype:
        return self._x.dtype

    @property
    def device(self) -> torch.device:
        return self._x.device

    @property
    def shape(self) -> tuple[int, int]:
        return (self._x.shape[0], self._size)
