"""Gemma 3 that sees images, from 4B on: Gemma 3 of text beside a SigLIP vision tower and what projects its outputs."""

from mxrot.models.beside import LLAVA_NAMES, Beside
from mxrot.models.families.gemma3 import FAMILY as OF_TEXT

FAMILY = OF_TEXT.with_beside(
    "gemma3_with_images",
    ("Gemma3ForConditionalGeneration",),
    Beside(("model.vision_tower", "model.multi_modal_projector"), ("gemma3_text",), LLAVA_NAMES),
)
