"""What a model is worth: perplexity, and where its outliers are."""

from mxrot.evaluation.divergence import Divergence, divergence
from mxrot.evaluation.inspection import KernelChoice, SiteMaxima, kernel_choices, site_maxima
from mxrot.evaluation.perplexity import Perplexity, perplexity

__all__ = [
    "Divergence",
    "KernelChoice",
    "Perplexity",
    "SiteMaxima",
    "divergence",
    "kernel_choices",
    "perplexity",
    "site_maxima",
]
