"""Qwen 3.5 with experts that sees images: Qwen 3.5 with experts, as Qwen 3.5 that sees images is Qwen 3.5."""

from mxrot.models.beside import WITHOUT_HEAD, Beside
from mxrot.models.families.qwen3_5_moe import FAMILY as OF_TEXT

FAMILY = OF_TEXT.with_beside(
    "qwen3_5_moe_with_images",
    ("Qwen3_5MoeForConditionalGeneration",),
    Beside(("model.visual",), ("qwen3_5_moe_text",), WITHOUT_HEAD),
)
