"""Mixtures of experts whose attention is Llama's. The sites of the experts follow from the config."""

from mxrot.models.experts import MIXTRAL_EXPERTS, QWEN3_EXPERTS
from mxrot.models.family import Family
from mxrot.models.llama import LLAMA_SITES

_ATTENTION = tuple(site for site in LLAMA_SITES if site.name in ("qkv", "o"))

MIXTRAL = Family("mixtral", ("MixtralForCausalLM",), _ATTENTION, experts=MIXTRAL_EXPERTS)

QWEN3_MOE = Family("qwen3_moe", ("Qwen3MoeForCausalLM",), _ATTENTION, experts=QWEN3_EXPERTS)
