"""Arcee's AFM: Llama's attention, and an MLP without gate. The square behind `up` leaves no place for a scale."""

from mxrot.models.families.llama import ATTENTION_SITES
from mxrot.models.family import Family, Site

WITHOUT_GATE = (
    *ATTENTION_SITES,
    Site("up", ("mlp.up_proj",), norm="post_attention_layernorm"),
    Site("down", ("mlp.down_proj",), residual="post_attention_layernorm"),
)

FAMILY = Family(
    "arcee",
    ("ArceeForCausalLM",),
    WITHOUT_GATE,
    norm_class="ArceeRMSNorm",
    rotation_obstacle=None,
    inner_rows="mlp.up_proj",
)
