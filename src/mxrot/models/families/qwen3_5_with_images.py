"""Qwen 3.5 that sees images: Qwen 3.5 of text beside a vision tower, with a rotary embedding of three axes, which are
alike in text."""

from mxrot.models.beside import WITHOUT_HEAD, Beside
from mxrot.models.families.qwen3_5 import FAMILY as OF_TEXT

FAMILY = OF_TEXT.with_beside(
    "qwen3_5_with_images",
    ("Qwen3_5ForConditionalGeneration",),
    Beside(("model.visual",), ("qwen3_5_text",), WITHOUT_HEAD),
)
