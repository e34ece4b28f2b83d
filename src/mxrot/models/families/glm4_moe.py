"""GLM 4.5: the first blocks have a plain MLP, the others experts and one that every token goes to. The router adds a
bias to the scores that it chooses by, in float32."""

from typing import Any

from mxrot.models.expert_names import DENSE, SPARSE, ExpertNames
from mxrot.models.families.llama import SITES_BESIDE_EXPERTS
from mxrot.models.family import Family


def kinds_after_dense(config: Any) -> tuple[str, ...]:
    """All blocks but the first `first_k_dense_replace` have experts."""
    first = config.first_k_dense_replace
    return tuple(DENSE if index < first else SPARSE for index in range(config.num_hidden_layers))


FAMILY = Family(
    "glm4_moe",
    ("Glm4MoeForCausalLM",),
    SITES_BESIDE_EXPERTS,
    norm_class="Glm4MoeRMSNorm",
    rotation_obstacle=None,
    experts=ExpertNames(
        "Glm4MoeExperts", "n_routed_experts", ("gate_proj", "up_proj", "down_proj"), shared="mlp.shared_experts"
    ),
    kinds_of=kinds_after_dense,
    in_float32=("mlp.gate.e_score_correction_bias",),
)
