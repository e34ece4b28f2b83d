"""EXAONE 4: OLMo 2's blocks, with norms of queries and keys by head.

In a model with windows, blocks without one have no rotary embedding.
"""

from mxrot.models.families.olmo2 import BEHIND_OBSTACLE, NORMS_BEHIND
from mxrot.models.family import Family

FAMILY = Family(
    "exaone4",
    ("Exaone4ForCausalLM",),
    NORMS_BEHIND,
    windows="by kind",
    norm_class="Exaone4RMSNorm",
    rotation_obstacle=BEHIND_OBSTACLE,
)
