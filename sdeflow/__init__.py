"""sdeflow: stochastic differential equations and diffusion models in PyTorch.

sampler = process x solver x grid. See the README for the whole library in five minutes.
"""

from .adaptive import Adaptive
from .backends import TorchDiffEq, TorchSDE
from .brownian import BrownianPath
from .calculus import Hutchinson
from .denoiser import Denoiser
from .detect import gaussian
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
from .linear import LinearSDE
from .local import local_score
from .loss import denoising_loss, sample_times, score_matching
from .matching import (
    DenoisingScoreMatching,
    ImplicitScoreMatching,
    LocalScoreMatching,
    SlicedScoreMatching,
    score_loss,
)
from .noise import SeededNoise
from .nonlinear import CIR, GBM, DoubleWell, Heston, Lorenz, StudentT
from .plugins import catalogue, get, hookimpl
from .presets import Preset
from .processes import (
    CLD,
    EDM,
    OU,
    VE,
    VP,
    BrownianBridge,
    Cosine,
    MatrixOU,
    RectifiedFlow,
    SubVP,
)
from .reverse import ReverseSDE, probability_flow, reverse, tweedie
from .runge_kutta import SRK, Platen
from .sample import Solution, encode, integrate, sample, trajectory
from .sde import SDE, GaussianSDE
from .solver import Solver, StepSolver
from .solvers import EulerHeun, EulerMaruyama, Heun, Milstein
from .system import LinearSystem
from .tableau import Tableau, trace
from .tree import BrownianTree

__version__ = "0.1.0"

__all__ = [
    "CIR",
    "CLD",
    "EDM",
    "GBM",
    "OU",
    "SDE",
    "SRK",
    "VE",
    "VP",
    "Adaptive",
    "ArgumentError",
    "BrownianBridge",
    "BrownianPath",
    "BrownianTree",
    "Cosine",
    "Denoiser",
    "DenoisingScoreMatching",
    "DoubleWell",
    "EulerHeun",
    "EulerMaruyama",
    "GaussianSDE",
    "GridError",
    "Heun",
    "Heston",
    "Hutchinson",
    "ImplicitScoreMatching",
    "LinearSDE",
    "LinearSystem",
    "LocalScoreMatching",
    "Lorenz",
    "MatrixOU",
    "Milstein",
    "NonFiniteError",
    "PairingError",
    "Platen",
    "PluginError",
    "RectifiedFlow",
    "Preset",
    "ReverseSDE",
    "SdeflowError",
    "SeededNoise",
    "ShapeError",
    "SlicedScoreMatching",
    "Solution",
    "Solver",
    "SolverError",
    "StepSolver",
    "StudentT",
    "SubVP",
    "Tableau",
    "TorchDiffEq",
    "TorchSDE",
    "UnknownNameError",
    "catalogue",
    "denoising_loss",
    "encode",
    "gaussian",
    "get",
    "hookimpl",
    "integrate",
    "local_score",
    "probability_flow",
    "reverse",
    "sample",
    "sample_times",
    "score_loss",
    "score_matching",
    "trace",
    "trajectory",
    "tweedie",
]
