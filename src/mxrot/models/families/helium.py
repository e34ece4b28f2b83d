"""Helium: Llama's blocks. The rotary embedding turns pairs of neighbours."""

from mxrot.models.families.llama import LLAMA_SITES
from mxrot.models.family import Family

FAMILY = Family(
    "helium",
    ("HeliumForCausalLM",),
    LLAMA_SITES,
    norm_class="HeliumRMSNorm",
    rotation_obstacle=None,
)
