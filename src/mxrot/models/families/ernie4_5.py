"""ERNIE 4.5 without experts: Llama's blocks. The rotary embedding turns pairs of neighbours."""

from mxrot.models.families.llama import LLAMA_SITES
from mxrot.models.family import Family

FAMILY = Family(
    "ernie4_5",
    ("Ernie4_5ForCausalLM",),
    LLAMA_SITES,
    norm_class="Ernie4_5RMSNorm",
    rotation_obstacle=None,
)
