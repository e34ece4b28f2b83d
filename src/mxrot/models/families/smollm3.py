"""SmolLM 3: Llama's blocks, some of which have no rotary embedding; those may attend to a window."""

from mxrot.models.families.llama import LLAMA_SITES
from mxrot.models.family import Family

FAMILY = Family(
    "smollm3",
    ("SmolLM3ForCausalLM",),
    LLAMA_SITES,
    windows="by kind",
    norm_class="SmolLM3RMSNorm",
    rotation_obstacle=None,
)
