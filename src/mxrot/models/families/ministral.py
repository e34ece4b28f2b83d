"""Ministral of 2024 as transformers has it: Mistral's blocks, of which some attend to a window."""

from mxrot.models.families.llama import LLAMA_SITES
from mxrot.models.family import Family

FAMILY = Family(
    "ministral",
    ("MinistralForCausalLM",),
    LLAMA_SITES,
    windows="by kind",
    norm_class="MinistralRMSNorm",
    rotation_obstacle=None,
)
