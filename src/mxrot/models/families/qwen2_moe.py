"""Qwen 2 with experts: Qwen 2's attention, and an expert that every token goes to, whose output a linear of one row and
a sigmoid weigh. Some blocks may have a plain MLP."""

from typing import Any

from mxrot.models.expert_names import DENSE, SPARSE, ExpertNames
from mxrot.models.families.llama import SITES_BESIDE_EXPERTS
from mxrot.models.family import Family


def kinds_by_step(config: Any) -> tuple[str, ...]:
    """Every `decoder_sparse_step`th block has experts, but for those that `mlp_only_layers` lists."""
    plain = set(config.mlp_only_layers or ())
    return tuple(
        DENSE if index in plain or (index + 1) % config.decoder_sparse_step else SPARSE
        for index in range(config.num_hidden_layers)
    )


FAMILY = Family(
    "qwen2_moe",
    ("Qwen2MoeForCausalLM",),
    SITES_BESIDE_EXPERTS,
    windows="by kind",
    norm_class="Qwen2MoeRMSNorm",
    rotation_obstacle=None,
    experts=ExpertNames(
        "Qwen2MoeExperts",
        "num_experts",
        ("gate_proj", "up_proj", "down_proj"),
        routers=("mlp.gate", "mlp.shared_expert_gate"),
        shared="mlp.shared_expert",
    ),
    kinds_of=kinds_by_step,
)
