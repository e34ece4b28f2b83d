"""OLMoE: norms of queries and keys over all heads, and experts in every block. Values that are clipped (`clip_qkv`)
would not be the rows of v any more."""

from mxrot.models.expert_names import ExpertNames
from mxrot.models.families.llama import ATTENTION_SITES
from mxrot.models.family import Family

FAMILY = Family(
    "olmoe",
    ("OlmoeForCausalLM",),
    ATTENTION_SITES,
    norm_class="OlmoeRMSNorm",
    rotation_obstacle=None,
    experts=ExpertNames("OlmoeExperts", "num_experts", ("gate_proj", "up_proj", "down_proj")),
    holds_for=(("clip_qkv", None),),
)
