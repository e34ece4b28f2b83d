"""Llama: 1, 2, 3 and everything that declares itself LlamaForCausalLM (SmolLM2, TinyLlama, Vicuna, ...)."""

from dataclasses import replace

from mxrot.models.expert_names import DENSE
from mxrot.models.family import Family, Site

LLAMA_SITES = (
    Site("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), norm="input_layernorm"),
    Site(
        "o",
        ("self_attn.o_proj",),
        producer="self_attn.v_proj",
        producer_is_value=True,
        residual="input_layernorm",
    ),
    Site("gate_up", ("mlp.gate_proj", "mlp.up_proj"), norm="post_attention_layernorm"),
    Site("down", ("mlp.down_proj",), producer="mlp.up_proj", residual="post_attention_layernorm"),
)

ATTENTION_SITES = tuple(site for site in LLAMA_SITES if site.name in ("qkv", "o"))
SITES_BESIDE_EXPERTS = tuple(replace(s, only_in="" if s in ATTENTION_SITES else DENSE) for s in LLAMA_SITES)
"""Where some blocks have experts in the place of the MLP."""
MLP_SITES_BESIDE_EXPERTS = tuple(site for site in SITES_BESIDE_EXPERTS if site.only_in == DENSE)

FAMILY = Family("llama", ("LlamaForCausalLM",), LLAMA_SITES, norm_class="LlamaRMSNorm", rotation_obstacle=None)
