"""Apertus: no gate in the MLP, whose function has two learned numbers; norms of queries and keys."""

from dataclasses import replace

from mxrot.models.families.arcee import WITHOUT_GATE
from mxrot.models.family import Family

_NORMS = {"input_layernorm": "attention_layernorm", "post_attention_layernorm": "feedforward_layernorm"}

FAMILY = Family(
    "apertus",
    ("ApertusForCausalLM",),
    tuple(
        replace(site, norm=site.norm and _NORMS[site.norm], residual=site.residual and _NORMS[site.residual])
        for site in WITHOUT_GATE
    ),
    norm_class="ApertusRMSNorm",
    rotation_obstacle=None,
    inner_rows="mlp.up_proj",
)
