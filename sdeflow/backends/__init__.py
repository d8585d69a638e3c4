"""The integrators of torchdiffeq and torchsde as solvers. Both are imported when first used."""

from .ode import ODE_METHODS, TorchDiffEq
from .sde import SDE_METHODS, TorchSDE

__all__ = ["ODE_METHODS", "SDE_METHODS", "TorchDiffEq", "TorchSDE"]
