"""Hunyuan 1 without experts: queries and keys have norms of their own, behind the rotary embedding."""

from mxrot.models.families.llama import LLAMA_SITES
from mxrot.models.family import Family

FAMILY = Family(
    "hunyuan_v1_dense",
    ("HunYuanDenseV1ForCausalLM",),
    LLAMA_SITES,
    norm_class="HunYuanDenseV1RMSNorm",
    rotation_obstacle=None,
)
