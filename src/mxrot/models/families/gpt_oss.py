"""gpt-oss: experts with biases, and bounds on what gate and up give; in attention biases, windows in every other block,
and a score of each head that takes a part of attention and gives nothing (a sink)."""

from mxrot.models.expert_names import ExpertNames
from mxrot.models.families.llama import ATTENTION_SITES
from mxrot.models.family import Family

FAMILY = Family(
    "gpt_oss",
    ("GptOssForCausalLM",),
    ATTENTION_SITES,
    windows="by kind",
    heads_obstacle="each of its heads has a sink, a score beside those of tokens",
    norm_class="GptOssRMSNorm",
    rotation_obstacle=None,
    experts=ExpertNames(
        "GptOssExperts",
        "num_local_experts",
        ("gate_proj", "up_proj", "down_proj"),
        routers=("mlp.router",),
        gated="clamped",
        has_bias=True,
        is_transposed=True,
        is_interleaved=True,
    ),
)
