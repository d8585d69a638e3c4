"""Historical mistakes of samplers, each planted in a copy of a solver that is right."""

from . import memory, noise, tensors, times_and_claims
from .memory import Corrected, Taylor
from .planting import FAULTS

HONEST = (Taylor(), Corrected())
"""What some of them are planted in."""

__all__ = [
    "FAULTS",
    "HONEST",
    "Corrected",
    "Taylor",
    "memory",
    "noise",
    "tensors",
    "times_and_claims",
]
