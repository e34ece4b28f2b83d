"""Qwen 2.5 VL: Qwen 2 with a rotary embedding of three axes, which are alike in text, beside a vision tower."""

from dataclasses import replace

from mxrot.models.beside import Beside
from mxrot.models.families.qwen2 import FAMILY as OF_TEXT

FAMILY = replace(
    OF_TEXT.with_beside(
        "qwen2_5_vl",
        ("Qwen2_5_VLForConditionalGeneration",),
        Beside(
            ("model.visual",),
            ("qwen2_5_vl_text",),
            (
                ("visual.", "model.visual."),
                ("language_model.", "model.language_model."),
                *((f"model.{part}.", f"model.language_model.{part}.") for part in ("embed_tokens", "layers", "norm")),
            ),
        ),
    ),
    norm_class="Qwen2_5_VLRMSNorm",
)
