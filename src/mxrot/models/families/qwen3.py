"""Qwen 3: queries and keys have norms of their own, behind their linears."""

from mxrot.models.families.llama import LLAMA_SITES
from mxrot.models.family import Family

FAMILY = Family(
    "qwen3",
    ("Qwen3ForCausalLM",),
    LLAMA_SITES,
    windows="by kind",
    norm_class="Qwen3RMSNorm",
    rotation_obstacle=None,
)
