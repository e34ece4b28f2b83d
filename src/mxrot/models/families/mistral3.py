"""Mistral Small from 3.1 on, Devstral and Ministral 3 that see images: a text model of Mistral or Ministral 3 beside a
Pixtral vision tower and what projects its outputs."""

from mxrot.models.beside import LLAVA_NAMES, Beside
from mxrot.models.families.ministral3 import FAMILY as OF_TEXT

FAMILY = OF_TEXT.with_beside(
    "mistral3",
    ("Mistral3ForConditionalGeneration",),
    Beside(("model.vision_tower", "model.multi_modal_projector"), ("ministral3", "mistral"), LLAVA_NAMES),
)
