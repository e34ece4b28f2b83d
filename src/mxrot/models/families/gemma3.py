"""Gemma 3 of text: as Gemma 2 without its bounds.

Queries and keys have norms of their own, behind their linears, and the two kinds of blocks have rotary embeddings of
their own. Models that see images, too, are another class.
"""

from mxrot.models.families.gemma2 import GEMMA_OBSTACLE, GEMMA_SITES
from mxrot.models.family import Family

FAMILY = Family(
    "gemma3",
    ("Gemma3ForCausalLM",),
    GEMMA_SITES,
    starts_with_bos=True,
    windows="by kind",
    rotation_obstacle=GEMMA_OBSTACLE,
)
