"""DeepSeek V3 and R1: multi-head latent attention. The first blocks have a plain MLP, the others experts and one that
every token goes to. The router adds a bias to the scores that it chooses by, in float32.

Keys and values of a token are computed from one narrow vector, and queries from another, each with a norm of its own.
The vectors are what a cache holds: they are expanded to heads each time that attention reads them.
"""

from typing import Any

from mxrot.models.expert_names import ExpertNames
from mxrot.models.families.glm4_moe import kinds_after_dense
from mxrot.models.families.llama import MLP_SITES_BESIDE_EXPERTS
from mxrot.models.family import Family, Site

LATENT_CACHE = (
    "its cache holds the vectors that keys and values are computed from, and the two are of different widths "
    "(multi-head latent attention)"
)
VALUES = "self_attn.kv_b_proj"


def latent_sites(config: Any) -> tuple[Site, ...]:
    """Of attention; small models compute queries without a narrow vector (`q_lora_rank` None)."""
    narrow = config.q_lora_rank is not None
    first = ("self_attn.q_a_proj" if narrow else "self_attn.q_proj", "self_attn.kv_a_proj_with_mqa")
    of_queries = Site("q_b", ("self_attn.q_b_proj",), norm="self_attn.q_a_layernorm", norm_is_inner=True)
    return (
        Site("qkv_a" if narrow else "q_kv_a", first, norm="input_layernorm"),
        *((of_queries,) if narrow else ()),
        Site("kv_b", (VALUES,), norm="self_attn.kv_a_layernorm", norm_is_inner=True),
        Site(
            "o",
            ("self_attn.o_proj",),
            producer=VALUES,
            producer_is_value=True,
            keys_beside_values=True,
            residual="input_layernorm",
        ),
    )


FAMILY = Family(
    "deepseek_v3",
    ("DeepseekV3ForCausalLM",),
    MLP_SITES_BESIDE_EXPERTS,
    attention_sites_of=latent_sites,
    heads_obstacle=LATENT_CACHE,
    values=VALUES,
    norm_class="DeepseekV3RMSNorm",
    rotation_obstacle=None,
    experts=ExpertNames(
        "DeepseekV3Experts", "n_routed_experts", ("gate_proj", "up_proj", "down_proj"), shared="mlp.shared_experts"
    ),
    kinds_of=kinds_after_dense,
    in_float32=("mlp.gate.e_score_correction_bias",),
)
