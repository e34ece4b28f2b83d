"""Jais 2: no gate in the MLP; norms take the mean away and have a bias."""

from mxrot.models.families.arcee import WITHOUT_GATE
from mxrot.models.families.cohere import MEAN_OBSTACLE
from mxrot.models.family import Family

FAMILY = Family(
    "jais2",
    ("Jais2ForCausalLM",),
    WITHOUT_GATE,
    rotation_obstacle=MEAN_OBSTACLE,
    inner_rows="mlp.up_proj",
)
