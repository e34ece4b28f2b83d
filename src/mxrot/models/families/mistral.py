"""Mistral: Llama's blocks, each of which may attend to a window."""

from mxrot.models.families.llama import LLAMA_SITES
from mxrot.models.family import Family

FAMILY = Family(
    "mistral",
    ("MistralForCausalLM",),
    LLAMA_SITES,
    windows="all",
    norm_class="MistralRMSNorm",
    rotation_obstacle=None,
)
