"""OLMo 3: OLMo 2's blocks, three of four of which attend to a window and have a rotary embedding of their own."""

from mxrot.models.families.olmo2 import BEHIND_OBSTACLE, NORMS_BEHIND
from mxrot.models.family import Family

FAMILY = Family(
    "olmo3",
    ("Olmo3ForCausalLM",),
    NORMS_BEHIND,
    windows="by kind",
    norm_class="Olmo3RMSNorm",
    rotation_obstacle=BEHIND_OBSTACLE,
)
