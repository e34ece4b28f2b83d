"""Phi 3 and 4: one linear for queries, keys and values, and one for gate and up.

Only some of their rows feed the next site, which therefore names no producer.
"""

from mxrot.models.family import Family, Site

FAMILY = Family(
    "phi3",
    ("Phi3ForCausalLM",),
    (
        Site("qkv", ("self_attn.qkv_proj",), norm="input_layernorm"),
        Site("o", ("self_attn.o_proj",), residual="input_layernorm"),
        Site("gate_up", ("mlp.gate_up_proj",), norm="post_attention_layernorm"),
        Site("down", ("mlp.down_proj",), residual="post_attention_layernorm"),
    ),
    windows="all",
    norm_class="Phi3RMSNorm",
    rotation_obstacle=None,
    values="self_attn.qkv_proj",
    inner_rows="mlp.gate_up_proj",
)
