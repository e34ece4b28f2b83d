"""Qwen 3 with experts: Llama's attention with norms of queries and keys. The sites of the experts follow from the
config."""

from mxrot.models.expert_names import ExpertNames
from mxrot.models.families.llama import ATTENTION_SITES
from mxrot.models.family import Family

FAMILY = Family(
    "qwen3_moe",
    ("Qwen3MoeForCausalLM",),
    ATTENTION_SITES,
    norm_class="Qwen3MoeRMSNorm",
    rotation_obstacle=None,
    experts=ExpertNames("Qwen3MoeExperts", "num_experts", ("gate_proj", "up_proj", "down_proj")),
)
