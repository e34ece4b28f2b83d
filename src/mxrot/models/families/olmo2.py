"""OLMo 2: norms stand behind attention and MLP. Sites read the residual stream itself, and nothing is added to it
directly."""

from dataclasses import replace

from mxrot.models.families.llama import LLAMA_SITES
from mxrot.models.family import Family

NORMS_BEHIND = tuple(replace(site, norm=None, residual=None) for site in LLAMA_SITES)

BEHIND_OBSTACLE = "what attention and MLP give passes a norm with gains of its own before it joins the stream"

FAMILY = Family(
    "olmo2",
    ("Olmo2ForCausalLM",),
    NORMS_BEHIND,
    norm_class="Olmo2RMSNorm",
    rotation_obstacle=BEHIND_OBSTACLE,
)
