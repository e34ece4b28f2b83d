"""Granite: factors on the embedding, the scores of attention and what is added to the residual stream, and a divisor of
the logits. What a site gives is not added as it is.
"""

from dataclasses import replace

from mxrot.models.families.llama import LLAMA_SITES
from mxrot.models.family import Family

FAMILY = Family(
    "granite",
    ("GraniteForCausalLM",),
    tuple(replace(site, residual=None) for site in LLAMA_SITES),
    norm_class="GraniteRMSNorm",
    rotation_obstacle=None,
)
