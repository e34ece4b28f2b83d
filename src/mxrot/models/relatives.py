"""Families whose blocks are nearly Llama's: a bias more, norms of queries and keys, or norms in other places."""

from dataclasses import replace

from mxrot.models.family import Family, Site
from mxrot.models.llama import LLAMA_SITES

MISTRAL = Family("mistral", ("MistralForCausalLM",), LLAMA_SITES, windows="all")

QWEN2 = Family("qwen2", ("Qwen2ForCausalLM",), LLAMA_SITES, windows="by kind")
"""Qwen 2 and 2.5: biases in q, k and v."""

QWEN3 = Family("qwen3", ("Qwen3ForCausalLM",), LLAMA_SITES, windows="by kind")
"""Queries and keys have norms of their own, behind their linears."""

OLMO2 = Family("olmo2", ("Olmo2ForCausalLM",), tuple(replace(site, norm=None, residual=None) for site in LLAMA_SITES))
"""Norms stand behind attention and MLP: sites read the residual stream itself, and nothing is added to it directly."""

GRANITE = Family("granite", ("GraniteForCausalLM",), tuple(replace(site, residual=None) for site in LLAMA_SITES))
"""Factors on the embedding, the scores of attention, what is added to the residual stream, and a divisor of the logits:
what a site gives is not added as it is."""

PHI3 = Family(
    "phi3",
    ("Phi3ForCausalLM",),
    (
        Site("qkv", ("self_attn.qkv_proj",), norm="input_layernorm"),
        Site("o", ("self_attn.o_proj",), residual="input_layernorm"),
        Site("gate_up", ("mlp.gate_up_proj",), norm="post_attention_layernorm"),
        Site("down", ("mlp.down_proj",), residual="post_attention_layernorm"),
    ),
    windows="all",
)
"""One linear for queries, keys and values, and one for gate and up. Only some of their rows feed the next site, which
therefore names no producer."""
