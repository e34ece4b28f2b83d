"""Qwen 3 VL: Qwen 3 with a rotary embedding of three axes, which are alike in text, beside a vision tower. States of
images are added to those behind the first decoder blocks, too."""

from dataclasses import replace

from mxrot.models.beside import WITHOUT_HEAD, Beside
from mxrot.models.families.qwen3 import FAMILY as OF_TEXT

FAMILY = replace(
    OF_TEXT.with_beside(
        "qwen3_vl",
        ("Qwen3VLForConditionalGeneration",),
        Beside(("model.visual",), ("qwen3_vl_text",), WITHOUT_HEAD),
    ),
    windows="none",
    norm_class="Qwen3VLTextRMSNorm",
)
