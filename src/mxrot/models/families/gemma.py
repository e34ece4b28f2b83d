"""Gemma 1: Llama's blocks, whose norms multiply by 1 + weight. The embedding is multiplied by sqrt(hidden size)."""

from dataclasses import replace

from mxrot.models.families.llama import LLAMA_SITES
from mxrot.models.family import Family

FAMILY = Family(
    "gemma",
    ("GemmaForCausalLM",),
    tuple(replace(site, norm_adds_one=site.norm is not None) for site in LLAMA_SITES),
    starts_with_bos=True,
    rotation_obstacle=None,
)
