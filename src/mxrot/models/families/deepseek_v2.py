"""DeepSeek V2 and V2-Lite: as V3, with a softmax in the router, and no bias."""

from dataclasses import replace

from mxrot.models.expert_names import ExpertNames
from mxrot.models.families.deepseek_v3 import FAMILY as V3

FAMILY = replace(
    V3,
    name="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    norm_class="DeepseekV2RMSNorm",
    experts=ExpertNames(
        "DeepseekV2Experts", "n_routed_experts", ("gate_proj", "up_proj", "down_proj"), shared="mlp.shared_experts"
    ),
    in_float32=(),
)
