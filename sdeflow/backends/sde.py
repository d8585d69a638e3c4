"""The methods of torchsde as solvers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError, PairingError, one_of
from ..noise import Noise
from ..sde import SDE
from ..solver import Solver
from .parameters import check_parameters, parameters_of


class Method(NamedTuple):
    """What is known of one method of torchsde."""

    calculus: str
    """The sense in which it reads the drift."""
    weak: float
    """The weak order on additive noise; 1 on any other."""
    additive: float
    """The strong order on additive noise."""
    commuting: float
    """The strong order on noise that commutes: elementwise, scalar, commutative matrices."""
    matrix: float | None
    """The strong order on any matrix; None: it takes no matrix that looks at the state."""
    evaluations: int
    """Drifts a step on additive noise."""
    adjoint: str | None = None
    """The method that runs its adjoint backwards; None: by the kind of noise."""


SDE_METHODS: dict[str, Method] = {
    #                              calculus        weak add. comm. matrix drifts
    "euler": Method("ito", 1, 1, 0.5, 0.5, 1),
    "milstein": Method("ito", 1, 1, 1, None, 1),
    "srk": Method("ito", 2, 1.5, 1.5, None, 2),
    "milstein_stratonovich": Method("stratonovich", 1, 1, 1, None, 1),
    "euler_heun": Method("stratonovich", 1, 1, 1, 0.5, 1),
    "heun": Method("stratonovich", 2, 1, 1, 0.5, 2),
    "midpoint": Method("stratonovich", 2, 1, 1, 0.5, 2),
    "log_ode": Method("stratonovich", 2, 1, 1, 0.5, 2),
    "reversible_heun": Method("stratonovich", 2, 1, 1, 0.5, 1, "adjoint_reversible_heun"),
}
BACKWARDS = {"ito": ("euler", "milstein"), "stratonovich": ("euler_heun", "heun", "midpoint")}
"""The methods that can run an adjoint: they need products with the diffusion alone."""


@dataclass(frozen=True)
class TorchSDE(Solver):
    """A method of torchsde, on any grid, state of any rank, forward or in reverse.

    method: euler, milstein, srk (Ito); milstein_stratonovich, euler_heun, heun, midpoint, log_ode,
        reversible_heun (Stratonovich: the drift is converted for them where the noise depends on
        the state). The Milstein schemes and srk take elementwise, scalar and additive noise, and
        of elementwise noise that whose g_i looks at x_i alone; the others take any.
    adjoint: how gradients come about (integrate(..., grad=True)): False, by backpropagation through
        the steps; True, by torchsde's sdeint_adjoint: the path is run backwards from its end, and
        nothing of it is kept; with keep=True its states are, and are the better starts. The two
        gradients agree as steps shrink, at the strong order of the backward method, and for
        reversible_heun to rounding at any step. The backward run is of noise asked for again:
        free from a seed or a BrownianPath, while the draws of any other source are kept.
    adjoint_method: that runs backwards; by default midpoint for Stratonovich, milstein for Ito with
        elementwise noise, else euler.
    parameters: the tensors beside x that want gradients from the adjoint; None finds those that
        drift and diffusion look at, by one evaluation at each end of the grid.
    Each step is torchsde's own, on a clock u in which the k-th interval of the grid is [k, k+1]:
    t = t_k + (u - k) h, f~ = f h and g~ = g sqrt|h|. The increments are ours: no Brownian tree.
    """

    method: str = "euler"
    adjoint: bool = False
    adjoint_method: str | None = None
    parameters: tuple[Tensor, ...] | None = field(default=None, repr=False, compare=False)

    needs = ("noise",)

    def __post_init__(self) -> None:
        one_of("method", self.method, SDE_METHODS)
        check_parameters(self.parameters)
        if self.adjoint_method is not None:
            if not self.adjoint or SDE_METHODS[self.method].adjoint:
                raise ArgumentError(
                    f"adjoint_method={self.adjoint_method!r} needs adjoint=True, and a method "
                    "other than reversible_heun, which has a reverse of its own"
                )
            one_of("adjoint_method", self.adjoint_method, BACKWARDS[self.calculus])

    @property
    def calculus(self) -> str:  # type: ignore[override]
        """The sense in which the method reads the drift."""
        return SDE_METHODS[self.method].calculus

    @property
    def weak_order(self) -> float:  # type: ignore[override]
        """The weak order on additive noise."""
        return SDE_METHODS[self.method].weak

    @property
    def strong_order(self) -> float:  # type: ignore[override]
        """The strong order on every SDE that it accepts; see `strong_order_on`."""
        method = SDE_METHODS[self.method]
        return method.commuting if method.matrix is None else method.matrix

    def strong_order_on(self, process: SDE) -> float | None:
        """The strong order on the noise of this process; None where it is refused."""
        method = SDE_METHODS[self.method]
        if process.additive:
            return method.additive
        if process.noise == "matrix" and (method.matrix is None or not process.commutative):
            return method.matrix
        return method.commuting

    @property
    def evaluations(self) -> float:  # type: ignore[override]
        """Evaluations of the drift a step, on additive noise."""
        return SDE_METHODS[self.method].evaluations

    def check(self, process: SDE) -> None:
        super().check(process)
        if self.strong_order_on(process) is None:
            raise PairingError(
                f"torchsde's {self.method} takes elementwise, scalar and additive noise, not a "
                "matrix that may depend on the state: use TorchSDE('euler') or TorchSDE('heun'), "
                "or declare `additive = True` if it does not"
            )
        if self.adjoint_method == "milstein" and (process.noise != "elementwise"):
            raise PairingError(
                "adjoint_method='milstein' takes elementwise noise: use adjoint_method='euler', or "
                "a Stratonovich method such as TorchSDE('midpoint', adjoint=True)"
            )

    def solve(
        self, process: SDE, x: Tensor, ts: Tensor, noise: Noise
    ) -> Iterator[tuple[Tensor, Tensor]]:
        return self._run(process, x, ts, noise, every=True)

    def end(
        self, process: SDE, x: Tensor, ts: Tensor, noise: Noise
    ) -> Iterator[tuple[Tensor, Tensor]]:
        return self._run(process, x, ts, noise, every=False)

    def _run(
        self, process: SDE, x: Tensor, ts: Tensor, noise: Noise, every: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        from . import _sde_adjoint, _torchsde

        if not x.numel():
            return ((t, x) for t in ts[1:])
        method, calculus = self.method.removesuffix("_stratonovich"), self.calculus
        if method in ("milstein", "srk") or (self.adjoint and calculus == "ito"):
            _torchsde.check_own(process, x, ts[0], method)
        if not (self.adjoint and torch.is_grad_enabled()):
            return _torchsde.steps(process, x, ts, noise, method, calculus)
        given = self.parameters
        wanted = parameters_of(process, x, ts) if given is None else given
        backwards = SDE_METHODS[self.method].adjoint or self.adjoint_method
        return _sde_adjoint.run(process, x, ts, noise, method, calculus, backwards, wanted, every)
