"""The conformance kit: problems with exact scores or solutions, exact output laws,
measured orders."""

from .adapters import azula_sampler, diffusers_scheduler, k_diffusion, native
from .auditing import audit
from .certificate import check_solver
from .foreign import Foreign, foreign, output_law_of
from .kernel import check_sde
from .known import KNOWN, Known
from .law import output_law
from .orders import order, strong_errors, weak_errors
from .problems import GaussianData, MixtureData

__all__ = [
    "KNOWN",
    "Foreign",
    "GaussianData",
    "Known",
    "MixtureData",
    "audit",
    "azula_sampler",
    "check_sde",
    "check_solver",
    "diffusers_scheduler",
    "foreign",
    "k_diffusion",
    "native",
    "order",
    "output_law",
    "output_law_of",
    "strong_errors",
    "weak_errors",
]
