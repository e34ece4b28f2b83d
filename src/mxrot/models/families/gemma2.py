"""Gemma 2: norms before and behind attention and MLP, and two kinds of blocks.

The norms multiply by 1 + weight. What attention and MLP give passes a norm before it is added to the residual stream,
so no site's output is added to it directly. Blocks attend to a window or to everything. The embedding is multiplied by
sqrt(hidden size), and the scores of attention and the logits are bounded by tanh.
"""

from dataclasses import replace

from mxrot.models.families.llama import LLAMA_SITES
from mxrot.models.family import Family

_BEFORE = {"qkv": "input_layernorm", "gate_up": "pre_feedforward_layernorm"}

GEMMA_SITES = tuple(
    replace(site, norm=_BEFORE.get(site.name), norm_adds_one=site.name in _BEFORE, residual=None)
    for site in LLAMA_SITES
)

GEMMA_OBSTACLE = "what attention and MLP give passes a norm with gains of its own before it joins the stream"

FAMILY = Family(
    "gemma2",
    ("Gemma2ForCausalLM",),
    GEMMA_SITES,
    starts_with_bos=True,
    windows="by kind",
    rotation_obstacle=GEMMA_OBSTACLE,
)
