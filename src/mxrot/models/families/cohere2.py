"""Cohere's Command R7B and A: attention and MLP side by side, as before. Blocks with a window have rotary embeddings,
the others have none."""

from mxrot.models.families.cohere import MEAN_OBSTACLE, SIDE_BY_SIDE
from mxrot.models.family import Family

FAMILY = Family(
    "cohere2",
    ("Cohere2ForCausalLM",),
    SIDE_BY_SIDE,
    windows="by kind",
    rotation_obstacle=MEAN_OBSTACLE,
)
