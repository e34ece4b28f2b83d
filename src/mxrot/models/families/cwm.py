"""Code World Model: Llama's blocks, of which some attend to a window."""

from mxrot.models.families.llama import LLAMA_SITES
from mxrot.models.family import Family

FAMILY = Family(
    "cwm",
    ("CwmForCausalLM",),
    LLAMA_SITES,
    windows="by kind",
    norm_class="CwmRMSNorm",
    rotation_obstacle=None,
)
