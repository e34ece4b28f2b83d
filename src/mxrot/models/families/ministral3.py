"""Ministral 3 of text: Mistral's blocks. Queries grow with their position beyond the first texts of training."""

from mxrot.models.families.llama import LLAMA_SITES
from mxrot.models.family import Family

FAMILY = Family(
    "ministral3",
    ("Ministral3ForCausalLM",),
    LLAMA_SITES,
    windows="all",
    norm_class="Ministral3RMSNorm",
    rotation_obstacle=None,
)
