"""Qwen 3 VL with experts: Qwen 3 with experts, as Qwen 3 VL is Qwen 3. The files of the hub have the
tensors of all experts turned, those that transformers writes again have not."""

from dataclasses import replace

from mxrot.models.beside import WITHOUT_HEAD, Beside
from mxrot.models.expert_names import ExpertNames
from mxrot.models.families.qwen3_moe import FAMILY as OF_TEXT

FAMILY = replace(
    OF_TEXT.with_beside(
        "qwen3_vl_moe",
        ("Qwen3VLMoeForConditionalGeneration",),
        Beside(
            ("model.visual",),
            ("qwen3_vl_moe_text",),
            WITHOUT_HEAD,
            turned=(("mlp.experts.gate_up_proj", -1), ("mlp.experts.down_proj", -2)),
        ),
    ),
    norm_class="Qwen3VLMoeTextRMSNorm",
    experts=ExpertNames("Qwen3VLMoeTextExperts", "num_experts", ("gate_proj", "up_proj", "down_proj")),
)
