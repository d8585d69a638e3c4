"""sdeflow: stochastic differential equations and diffusion models in PyTorch.

sampler = process x solver x grid. See the README for the whole library in five minutes.
"""

from .backends import TorchDiffEq, TorchSDE
from .denoiser import Denoiser
from .errors import (
    ArgumentError,
    GridError,
    NonFiniteError,
    PairingError,
    PluginError,
    SdeflowError,
    ShapeError,
    SolverError,
    UnknownNameError,
)
from .loss import denoising_loss, sample_times, score_matching
from .noise import SeededNoise
from .plugins import catalogue, get, hookimpl
from .processes import EDM, GBM, OU, VE, VP, Cosine, RectifiedFlow, SubVP
from .reverse import ReverseSDE, probability_flow, reverse, tweedie
from .sample import Solution, encode, integrate, sample, trajectory
from .sde import SDE, GaussianSDE
from .solver import Solver, StepSolver
from .solvers import EulerMaruyama, Heun
from .tableau import Tableau, trace

__version__ = "0.1.0"

__all__ = [
    "EDM",
    "GBM",
    "OU",
    "SDE",
    "VE",
    "VP",
    "ArgumentError",
    "Cosine",
    "Denoiser",
    "EulerMaruyama",
    "GaussianSDE",
    "GridError",
    "Heun",
    "NonFiniteError",
    "PairingError",
    "PluginError",
    "RectifiedFlow",
    "ReverseSDE",
    "SdeflowError",
    "SeededNoise",
    "ShapeError",
    "Solution",
    "Solver",
    "SolverError",
    "StepSolver",
    "SubVP",
    "Tableau",
    "TorchDiffEq",
    "TorchSDE",
    "UnknownNameError",
    "catalogue",
    "denoising_loss",
    "encode",
    "get",
    "hookimpl",
    "integrate",
    "probability_flow",
    "reverse",
    "sample",
    "sample_times",
    "score_matching",
    "trace",
    "trajectory",
    "tweedie",
]
