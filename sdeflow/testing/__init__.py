"""The conformance kit: problems with exact scores, exact output laws, measured orders."""

from .law import output_law
from .orders import order, strong_errors, weak_errors
from .problems import GaussianData, MixtureData

__all__ = [
    "GaussianData",
    "MixtureData",
    "order",
    "output_law",
    "strong_errors",
    "weak_errors",
]
