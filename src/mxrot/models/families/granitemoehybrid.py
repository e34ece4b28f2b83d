"""Granite 4 where every block is attention and a dense MLP: Granite's factors; gate and up are one linear.

Models with Mamba blocks or experts are refused."""

from dataclasses import replace

from mxrot.models.families.llama import ATTENTION_SITES
from mxrot.models.family import Family, Site

FAMILY = Family(
    "granitemoehybrid",
    ("GraniteMoeHybridForCausalLM",),
    (
        *(replace(site, residual=None) for site in ATTENTION_SITES),
        Site("gate_up", ("shared_mlp.input_linear",), norm="post_attention_layernorm"),
        Site("down", ("shared_mlp.output_linear",)),
    ),
    norm_class="GraniteMoeHybridRMSNorm",
    rotation_obstacle=None,
    inner_rows="shared_mlp.input_linear",
    holds_for=(("num_local_experts", 0),),
)
