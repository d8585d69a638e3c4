"""Score matching for every SDE: one call that picks the loss by what the SDE offers.

    denoising   |s(x_t) - grad log p(x_t | x_0)|^2      where the kernel of the SDE is known
    local       |s(x_t) - grad log p(x_t | x_s)|^2      s < t a short time apart on simulated paths
    implicit    1/2 |s|^2 + div s                       from samples of x_t alone
    sliced      the same with v^T (ds/dx) v for div s   v random signs

Each has its minimum at the score grad log p_t: a Markov process has grad log p_t(y) =
E[grad_y log p(x_t = y | x_s) | x_t = y] for every s < t. All are means over components and over the
times of the paths. Source: Hyvarinen (2005); Vincent (2011); Song et al. (2019, sliced);
Singhal et al. (2024, local).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .denoiser import Denoiser, checked_output
from .derivatives import flat
from .detect import gaussian
from .errors import ArgumentError, PairingError, ShapeError, one_of, positive_int
from .local import KERNELS, local_score
from .loss import TIMES, WEIGHTINGS, sample_times, score_matching
from .sample import integrate
from .sde import SDE, GaussianSDE
from .solver import Solver
from .system import LinearSystem, apply, cholesky

Score = Callable[[Tensor, Tensor], Tensor]
Weight = Callable[[Tensor], Tensor]


class ScoreLoss(ABC):
    """A score matching loss: a value whose repr says what it is, called for the loss of a batch."""

    @abstractmethod
    def __call__(
        self, score: Score, x0: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """The loss, a scalar to call backward() on, of data x0 (B, *) at t = 0.

        score: any callable (x, t) -> tensor of the shape of x, called with t (B,) in x's dtype.
        generator: a (host) one for repeatable times, noise and paths; otherwise torch's own.
        """


@dataclass(frozen=True)
class DenoisingScoreMatching(ScoreLoss):
    """|s(x_t, t) - grad log p(x_t | x_0)|^2, where the SDE has a Gaussian kernel.

    sde: a GaussianSDE: then this is `score_matching`, and trains a Denoiser on what it predicts;
        any other callable is taken as the score. Or a LinearSystem, with s(x_t) + P^{-1} (x_t - m).
    times, weighting: as for `score_matching`; for a LinearSystem "uniform" or a function, and
        "noise", |L^T (s - s*)|^2 with P = L L^T, or "likelihood", |G^T (s - s*)|^2.
    Source: Vincent (2011).
    """

    sde: GaussianSDE | LinearSystem
    times: Any = "uniform"
    weighting: Any = "noise"

    def __post_init__(self) -> None:
        if not isinstance(self.sde, GaussianSDE | LinearSystem):
            raise PairingError(
                f"{type(self.sde).__name__} has no Gaussian kernel to match; use "
                "LocalScoreMatching(sde), or score_loss(sde), which picks"
            )
        system = isinstance(self.sde, LinearSystem)
        for name, table, own in (
            ("times", TIMES, ["uniform"]),
            ("weighting", WEIGHTINGS, ["noise", "likelihood"]),
        ):
            if system or isinstance(getattr(self, name), str):
                if not (name == "times" and callable(self.times)):
                    one_of(name, getattr(self, name), own if system else table)

    def __call__(
        self, score: Score, x0: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        if isinstance(self.sde, LinearSystem):
            return self._system(self.sde, score, x0, generator)
        denoiser = score if isinstance(score, Denoiser) else Denoiser(score, self.sde, "score")
        if denoiser.sde != self.sde:
            raise PairingError(f"the denoiser was made for {denoiser.sde!r}, the loss {self.sde!r}")
        return score_matching(
            denoiser, x0, times=self.times, weighting=self.weighting, generator=generator
        )

    def _system(
        self, sde: LinearSystem, score: Score, x0: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        _check_data(x0)
        t = sample_times(cast(Any, sde), len(x0), self.times, generator=generator)
        noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype).to(x0.device)
        root = cholesky(sde.kernel_at(t).covariance, t)
        x = sde.mean(x0, t) + apply(root, noise)
        s = _evaluate(score, x, t)
        if self.weighting == "noise":
            return (apply(root.mT, s) + noise).square().mean()
        error = s + apply(torch.linalg.inv(root.mT), noise)
        return (error * sde.covariance_product(x, t, error)).mean()


@dataclass(frozen=True)
class LocalScoreMatching(ScoreLoss):
    """|G^T (s(x_t, t) - grad log p(x_t | x_s))|^2 over pairs of times s < t of simulated paths.

    sde: any forward SDE. gap: t - s; shorter ones before the first gap is over, where x_s is x_0.
    kernel: of the short transition, one of "corrected", "local_linear", "euler"; see
        `sdeflow.local`. The bias of the score falls with the gap, and the noise of the target as
        1/sqrt(gap): a better kernel allows a longer gap, hence less of both.
    solver: simulates the paths, with `substeps` equal steps a gap; its error is in the law that is
        learnt.
    every: of the times of a path, each is used (1), or every other one (2), ...
    weighting: "gap", t - s, which makes the noise of the target alike at all times; "likelihood",
        1, the bound of Song et al. (2021b); or a function of t.
    """

    sde: SDE
    gap: float = 0.1
    kernel: str = "corrected"
    solver: Solver | str = "euler_maruyama"
    substeps: int = 10
    every: int = 1
    weighting: str | Weight = "gap"

    def __post_init__(self) -> None:
        _check_forward(self.sde)
        if not 0 < self.gap <= self.sde.T:
            raise ArgumentError(f"gap={self.gap!r} must be > 0 and at most T={self.sde.T!r}")
        one_of("kernel", self.kernel, KERNELS)
        positive_int("substeps", self.substeps)
        positive_int("every", self.every)
        if isinstance(self.weighting, str):
            one_of("weighting", self.weighting, ("gap", "likelihood"))

    def __call__(
        self, score: Score, x0: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        return self.of_pairs(score, *self.pairs(x0, generator)).mean()

    def pairs(
        self, x0: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x_s, s, x_t, t), states (N B, *) and times (N B,), from one path for each x0."""
        dt = self.gap / self.substeps
        ts, path = simulate(self.sde, x0, dt, self.solver, generator)
        late = torch.arange(1 + _offset(self.every, len(ts), generator), len(ts), self.every)
        early = (late - self.substeps).clamp_min(0)

        def rows(index: Tensor) -> tuple[Tensor, Tensor]:
            return path[index].flatten(0, 1), ts[index].repeat_interleave(len(x0))

        return *rows(early), *rows(late)

    def of_pairs(self, score: Score, x: Tensor, s: Tensor, y: Tensor, t: Tensor) -> Tensor:
        """The loss of each pair x_s = x, x_t = y, (B,): states (B, *), times (B,)."""
        target = local_score(self.sde, x, s, y, t, self.kernel)
        error, times = _evaluate(score, y, t) - target, t.to(y)
        square = flat(error * self.sde.covariance_product(y, times, error)).mean(1)
        if callable(self.weighting):
            return self.weighting(t).to(square) * square
        return (t - s).to(square) * square if self.weighting == "gap" else square


@dataclass(frozen=True)
class ImplicitScoreMatching(ScoreLoss):
    """1/2 |s|^2 + div s at the states of simulated paths; no transition density is needed.

    sde: any forward SDE; a GaussianSDE is not simulated but drawn from its kernel.
    steps: of equal length in [0, T]. solver: simulates. weighting: a function of t; None for 1.
    The divergence takes as many backward passes as a state has numbers: for few of them.
    Its minimum is negative, -1/2 E|grad log p_t|^2. Source: Hyvarinen (2005), theorem 1.
    """

    sde: SDE
    steps: int = 100
    solver: Solver | str = "euler_maruyama"
    weighting: Weight | None = None

    def __post_init__(self) -> None:
        _check_forward(self.sde)
        positive_int("steps", self.steps)

    def __call__(
        self, score: Score, x0: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        x, t = marginals(self.sde, x0, self.steps, self.solver, generator)
        loss = self.of_samples(score, x, t, generator)
        return (loss if self.weighting is None else self.weighting(t).to(loss) * loss).mean()

    def of_samples(
        self, score: Score, x: Tensor, t: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """The loss of each sample, (B,), at x (B, *) and t (B,)."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            s = _evaluate(score, x, t)
            loss = flat(s.square()).mean(1) / 2 + self._divergence(s, x, generator) / x[0].numel()
        return loss if torch.is_grad_enabled() else loss.detach()

    def _divergence(self, s: Tensor, x: Tensor, generator: torch.Generator | None) -> Tensor:
        columns = flat(s)
        return torch.stack(
            [flat(_pull(columns[:, j].sum(), x))[:, j] for j in range(columns.shape[1])]
        ).sum(0)


@dataclass(frozen=True)
class SlicedScoreMatching(ImplicitScoreMatching):
    """1/2 |s|^2 + v^T (ds/dx) v, v random signs: implicit score matching for states of any size.

    projections: draws of v for each sample, a backward pass each. The rest is as for
    `ImplicitScoreMatching`, whose value it has on average; for states of one number it is the same.
    Source: Song et al. (2019), eq. 8, the variance-reduced form.
    """

    projections: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_int("projections", self.projections)

    def _divergence(self, s: Tensor, x: Tensor, generator: torch.Generator | None) -> Tensor:
        total = s.new_zeros(len(s))
        for _ in range(self.projections):
            v = torch.randint(0, 2, s.shape, generator=generator).to(s) * 2 - 1
            total = total + flat(v * _pull((v * s).sum(), x)).sum(1)
        return total / self.projections


METHODS: dict[str, type[Any]] = {
    "denoising": DenoisingScoreMatching,
    "local": LocalScoreMatching,
    "implicit": ImplicitScoreMatching,
    "sliced": SlicedScoreMatching,
}


def score_loss(sde: SDE, method: str = "auto", **settings: Any) -> ScoreLoss:
    """The score matching loss that `sde` allows, to be called as loss(score, x0).

    method: "denoising", "local", "implicit" or "sliced". "auto" picks denoising where the kernel is
        Gaussian, by the class of sde or because `gaussian(sde)` finds that it is linear; sliced for
        scalar and matrix noise that depends on the state, whose short transitions are known to
        first order only; and local elsewhere. What was picked, the repr says.
    settings: fields of the class picked, such as gap=0.05.
    """
    _check_forward(sde)
    if method == "auto":
        try:
            sde, method = gaussian(sde), "denoising"
        except ArgumentError:
            rough = sde.noise != "elementwise" and not sde.additive
            method = "sliced" if rough else "local"
    kind = METHODS[one_of("method", method, METHODS)]
    for name in settings:
        one_of(f"{kind.__name__}: setting", name, list(kind.__dataclass_fields__)[1:])
    return kind(sde, **settings)


# ---- paths


def simulate(
    sde: SDE, x0: Tensor, dt: float, solver: Solver | str, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """(times, path) of x0 carried to T in steps of dt: (N,) and (N, B, *), from t = 0.

    The first step is a random part of dt, so that the times are uniform in (0, T].
    """
    _check_data(x0)
    u = 1 - 0.999 * torch.rand((), dtype=torch.float64, generator=generator).item()
    count = max(1, math.floor(sde.T / dt - u + 1e-9) + 1)
    ts = (dt * (u + torch.arange(-1, count, dtype=torch.float64))).clamp(0, sde.T)
    seed = int(torch.randint(2**31, (), generator=generator))
    run = integrate(sde, x0.detach(), ts, solver, seed=seed, keep=True)
    assert run.path is not None
    return ts, run.path


def marginals(
    sde: SDE, x0: Tensor, steps: int, solver: Solver | str, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """(x, t): samples (M, *) of the laws p_t at times (M,), from one path for each x0; from the
    kernel, at `steps` times, where the SDE has one."""
    if isinstance(sde, GaussianSDE):
        x0 = x0.detach().repeat(steps, *[1] * (x0.ndim - 1))
        u = torch.rand(len(x0), dtype=torch.float64, generator=generator)
        t = sde.t_min + (sde.T - sde.t_min) * u
        noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype).to(x0.device)
        return sde.perturb(x0, t, noise), t
    ts, path = simulate(sde, x0, sde.T / steps, solver, generator)
    return path[1:].flatten(0, 1), ts[1:].repeat_interleave(len(x0))


def _offset(every: int, count: int, generator: torch.Generator | None) -> int:
    return int(torch.randint(min(every, count - 1), (), generator=generator)) if every > 1 else 0


def _evaluate(score: Score, x: Tensor, t: Tensor) -> Tensor:
    if not callable(score):
        raise ArgumentError(f"score={score!r} must be callable as score(x, t)")
    return checked_output("score", score(x, t.to(dtype=x.dtype, device=x.device)), x)


def _pull(a: Tensor, x: Tensor) -> Tensor:
    """da/dx, itself differentiable; zero where a does not look at x."""
    if not a.requires_grad:
        return torch.zeros_like(x)
    found = torch.autograd.grad(a, x, create_graph=True, allow_unused=True)[0]
    return torch.zeros_like(x) if found is None else found


def _check_data(x0: Tensor) -> None:
    if not x0.is_floating_point() or x0.ndim < 1 or not x0.numel():
        raise ShapeError(
            f"x0 is {tuple(x0.shape)} {x0.dtype}; it must be a batch (B, *) of at least one "
            "sample, in floating point"
        )


def _check_forward(sde: Any) -> None:
    if not isinstance(sde, SDE) or sde.direction <= 0:
        raise ArgumentError(f"sde={sde!r} must be a forward SDE: one with drift and diffusion")
