"""The evaluation of a model: perplexity, tasks, and the places of its outliers."""

from mxrot.evaluation.activations import ActivationView, activation_views
from mxrot.evaluation.answers import Answers
from mxrot.evaluation.cache_memory import measured_cache
from mxrot.evaluation.divergence import Divergence, divergence
from mxrot.evaluation.inspection import (
    KernelChoice,
    SiteMaxima,
    attention_operands,
    cache_schemes,
    cache_table,
    kernel_choices,
    quantizers,
    site_maxima,
    weight_exponents,
)
from mxrot.evaluation.kept_original import KeptOriginal
from mxrot.evaluation.passages import Passage, worst_passage
from mxrot.evaluation.perplexity import Perplexity, perplexity
from mxrot.evaluation.recovery import Recovery, recovery
from mxrot.evaluation.tasks import TaskScore, count_examples, load_tasks, mean_score, score_tasks, standard_error
from mxrot.evaluation.weight_values import weight_values

__all__ = [
    "ActivationView",
    "Answers",
    "Divergence",
    "KeptOriginal",
    "KernelChoice",
    "Passage",
    "Perplexity",
    "Recovery",
    "SiteMaxima",
    "TaskScore",
    "activation_views",
    "attention_operands",
    "cache_schemes",
    "cache_table",
    "count_examples",
    "divergence",
    "kernel_choices",
    "load_tasks",
    "mean_score",
    "measured_cache",
    "perplexity",
    "quantizers",
    "recovery",
    "score_tasks",
    "site_maxima",
    "standard_error",
    "weight_exponents",
    "weight_values",
    "worst_passage",
]
