"""Qwen 3.5 of text with experts in all blocks, and one that every token goes to, as in Qwen 3 Next."""

from dataclasses import replace

from mxrot.models.families.qwen3_5 import FAMILY as DENSE
from mxrot.models.families.qwen3_next import FAMILY as NEXT

assert NEXT.experts is not None

FAMILY = replace(
    DENSE,
    name="qwen3_5_moe",
    architectures=("Qwen3_5MoeForCausalLM",),
    sites=tuple(site for site in DENSE.sites if site.only_in),
    experts=replace(NEXT.experts, fused="Qwen3_5MoeExperts"),
)
