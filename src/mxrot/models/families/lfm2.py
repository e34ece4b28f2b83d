"""LFM2: gated short convolutions in most blocks, attention with norms of queries and keys in the others, and an MLP in
each. The linears before and behind a convolution are quantized."""

from dataclasses import replace
from typing import Any

from mxrot.models.families.bamba import ATTENDING, RECURRENT, attending, kinds_by_layer_types
from mxrot.models.families.llama import ATTENTION_SITES
from mxrot.models.family import LAYER_TYPES, Family, Kept, Site

SITES_BESIDE_MLP = (
    Site("conv_in", ("conv.in_proj",), norm="operator_norm", only_in=RECURRENT),
    Site("conv_out", ("conv.out_proj",), residual="operator_norm", only_in=RECURRENT),
    *(
        replace(site, linears=("self_attn.out_proj",)) if site.name == "o" else site
        for site in attending(ATTENTION_SITES, "operator_norm")
    ),
)
MLP_SITES = (
    Site("gate_up", ("feed_forward.w1", "feed_forward.w3"), norm="ffn_norm"),
    Site("down", ("feed_forward.w2",), producer="feed_forward.w3", residual="ffn_norm"),
)


def _states(config: Any) -> tuple[int, int]:
    """Numbers that the cache of a sequence holds of the last inputs of each convolution."""
    return config.layer_types.count("conv") * config.hidden_size * config.conv_L_cache, 0


FAMILY = Family(
    "lfm2",
    ("Lfm2ForCausalLM",),
    (*SITES_BESIDE_MLP, *MLP_SITES),
    final_norm="model.embedding_norm",
    attention_in=ATTENDING,
    layer_types=(*LAYER_TYPES, "conv"),
    kinds_of=kinds_by_layer_types,
    kept=(Kept((), "a convolution over a few tokens, channel by channel, is no linear", ("conv.conv",), RECURRENT),),
    states_of=_states,
    norm_class="Lfm2RMSNorm",
    rotation_obstacle=None,
    values_read_by="self_attn.out_proj",
)
