"""What a model is worth: perplexity, and where its outliers are."""

from mxrot.evaluation.activations import ActivationView, activation_views
from mxrot.evaluation.divergence import Divergence, divergence
from mxrot.evaluation.inspection import KernelChoice, SiteMaxima, kernel_choices, site_maxima, weight_exponents
from mxrot.evaluation.perplexity import Perplexity, perplexity

__all__ = [
    "ActivationView",
    "Divergence",
    "KernelChoice",
    "Perplexity",
    "SiteMaxima",
    "activation_views",
    "divergence",
    "kernel_choices",
    "perplexity",
    "site_maxima",
    "weight_exponents",
]
