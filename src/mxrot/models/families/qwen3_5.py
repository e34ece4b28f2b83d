"""Qwen 3.5 of text: Qwen 3 Next's blocks with Llama's MLP; of a delta net, each part of the input has a linear."""

from mxrot.models.families.llama import LLAMA_SITES
from mxrot.models.families.qwen3_next import (
    ATTENTION,
    delta_kept,
    delta_sites,
    delta_states,
    mixers,
    with_one_added,
)
from mxrot.models.family import LAYER_TYPES, Family

INSIDE = ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z")
SMALL_LINEARS = ("linear_attn.in_proj_b", "linear_attn.in_proj_a")

FAMILY = Family(
    "qwen3_5",
    ("Qwen3_5ForCausalLM",),
    (*delta_sites(INSIDE, SMALL_LINEARS), *with_one_added(LLAMA_SITES[2:])),
    attention_in=ATTENTION,
    values="",
    values_read_by="",
    rotation_obstacle=None,
    kinds_of=mixers,
    kept=delta_kept(SMALL_LINEARS),
    layer_types=(*LAYER_TYPES, "linear_attention"),
    states_of=delta_states,
)
