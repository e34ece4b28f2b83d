"""What a model is worth: perplexity, and where its outliers are."""

from mxrot.evaluation.inspection import KernelChoice, SiteMaxima, kernel_choices, site_maxima
from mxrot.evaluation.perplexity import Perplexity, perplexity

__all__ = ["KernelChoice", "Perplexity", "SiteMaxima", "kernel_choices", "perplexity", "site_maxima"]
