"""MiMo V2 Flash: experts as of GLM 4.5, but none for every token. Most blocks have windows, twice as many heads of keys
and values, and sinks.

Values are narrower than keys. How many heads of them a block has follows from its kind, so that no scale and no order
of channels goes from v to o.
"""

from dataclasses import replace
from typing import Any

from mxrot.models.expert_names import ExpertNames
from mxrot.models.families.deepseek_v32 import kinds_by_list
from mxrot.models.families.llama import SITES_BESIDE_EXPERTS
from mxrot.models.family import Family


def _cached(config: Any) -> tuple[int, ...]:
    """Keys and values, with twice as many heads in blocks with windows."""
    one = config.num_key_value_heads * (config.head_dim + config.v_head_dim)
    return tuple(2 * one if kind == "sliding_attention" else one for kind in config.layer_types)


FAMILY = Family(
    "mimo_v2_flash",
    ("MiMoV2FlashForCausalLM",),
    tuple(
        replace(site, producer=None, producer_is_value=False) if site.name == "o" else site
        for site in SITES_BESIDE_EXPERTS
    ),
    windows="by kind",
    values="",
    values_read_by="",
    cached_of=_cached,
    heads_obstacle="its blocks have other numbers of heads, values narrower than keys, and sinks",
    norm_class="MiMoV2FlashRMSNorm",
    rotation_obstacle=None,
    experts=ExpertNames(
        "MiMoV2FlashExperts",
        "n_routed_experts",
        ("gate_proj", "up_proj", "down_proj"),
        renamed=(("self_attn.attention_sink_bias", "self_attn.sinks"),),
    ),
    kinds_of=kinds_by_list,
    in_float32=("mlp.gate.e_score_correction_bias",),
)
