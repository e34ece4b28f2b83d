"""Gemma 4 that sees images, from 26B on: Gemma 4 of text beside a vision tower and what projects its outputs."""

from mxrot.models.beside import Beside
from mxrot.models.families.gemma4 import FAMILY as OF_TEXT

FAMILY = OF_TEXT.with_beside(
    "gemma4_with_images",
    ("Gemma4ForConditionalGeneration",),
    Beside(
        ("model.vision_tower", "model.embed_vision"),
        ("gemma4_text",),
        tuple((f"{part}.", f"model.{part}.") for part in ("language_model", "vision_tower", "embed_vision")),
        lacks=("audio_config",),
    ),
)
