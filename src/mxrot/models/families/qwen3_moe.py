"""Qwen 3 with experts: Llama's attention with norms of queries and keys. The sites of the experts follow from the
config, and so does which blocks have a plain MLP in their place."""

from mxrot.models.expert_names import ExpertNames
from mxrot.models.families.llama import SITES_BESIDE_EXPERTS
from mxrot.models.families.qwen2_moe import kinds_by_step
from mxrot.models.family import Family

FAMILY = Family(
    "qwen3_moe",
    ("Qwen3MoeForCausalLM",),
    SITES_BESIDE_EXPERTS,
    norm_class="Qwen3MoeRMSNorm",
    rotation_obstacle=None,
    experts=ExpertNames("Qwen3MoeExperts", "num_experts", ("gate_proj", "up_proj", "down_proj")),
    kinds_of=kinds_by_step,
)
