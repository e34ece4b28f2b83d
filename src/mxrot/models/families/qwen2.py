"""Qwen 2 and 2.5: biases in q, k and v."""

from mxrot.models.families.llama import LLAMA_SITES
from mxrot.models.family import Family

FAMILY = Family(
    "qwen2",
    ("Qwen2ForCausalLM",),
    LLAMA_SITES,
    windows="by kind",
    norm_class="Qwen2RMSNorm",
    rotation_obstacle=None,
)
