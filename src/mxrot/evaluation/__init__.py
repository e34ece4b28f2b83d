"""What a model is worth: perplexity, and where its outliers are."""

from mxrot.evaluation.inspection import SiteMaxima, site_maxima
from mxrot.evaluation.perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "SiteMaxima", "perplexity", "site_maxima"]
