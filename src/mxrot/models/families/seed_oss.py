"""Seed-OSS: Llama's blocks, with biases in q, k and v."""

from mxrot.models.families.llama import LLAMA_SITES
from mxrot.models.family import Family

FAMILY = Family(
    "seed_oss",
    ("SeedOssForCausalLM",),
    LLAMA_SITES,
    norm_class="SeedOssRMSNorm",
    rotation_obstacle=None,
)
