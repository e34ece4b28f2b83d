"""Gemma 2 and 3 (text): norms before and behind attention and MLP, and two kinds of blocks.

Their norms multiply by 1 + weight. What attention and MLP give passes a norm before it is added to the residual
stream, so no site's output is added to it directly. Blocks attend to a window or to everything; in Gemma 3 these two
kinds have rotary embeddings of their own. The embedding is multiplied by sqrt(hidden size), and Gemma 2 bounds the
scores of attention and the logits by tanh.
"""

from dataclasses import replace

from mxrot.models.family import Family
from mxrot.models.llama import LLAMA_SITES

_BEFORE = {"qkv": "input_layernorm", "gate_up": "pre_feedforward_layernorm"}

GEMMA_SITES = tuple(
    replace(site, norm=_BEFORE.get(site.name), norm_adds_one=site.name in _BEFORE, residual=None)
    for site in LLAMA_SITES
)

GEMMA2 = Family("gemma2", ("Gemma2ForCausalLM",), GEMMA_SITES, starts_with_bos=True, windows="by kind")

GEMMA3 = Family("gemma3", ("Gemma3ForCausalLM",), GEMMA_SITES, starts_with_bos=True, windows="by kind")
"""Queries and keys have norms of their own, behind their linears. Models that see images, too, are another class."""
