"""ERNIE 4.5 with experts: some blocks have a plain MLP, the others experts and, in most models, one that every token
goes to. The router computes in float32, with a bias on what it chooses by, which checkpoints hold outside of it."""

from typing import Any

from mxrot.models.expert_names import DENSE, SPARSE, ExpertNames
from mxrot.models.families.llama import SITES_BESIDE_EXPERTS
from mxrot.models.family import Family


def _kinds(config: Any) -> tuple[str, ...]:
    """Every `moe_layer_interval`th block from `moe_layer_start_index` to `moe_layer_end_index` has experts."""
    inside = range(config.moe_layer_start_index, config.moe_layer_end_index + 1)
    return tuple(
        SPARSE if index in inside and (index + 1) % config.moe_layer_interval == 0 else DENSE
        for index in range(config.num_hidden_layers)
    )


FAMILY = Family(
    "ernie4_5_moe",
    ("Ernie4_5_MoeForCausalLM",),
    SITES_BESIDE_EXPERTS,
    norm_class="Ernie4_5_MoeRMSNorm",
    rotation_obstacle=None,
    experts=ExpertNames(
        "Ernie4_5_MoeExperts",
        "moe_num_experts",
        ("gate_proj", "up_proj", "down_proj"),
        renamed=(("mlp.moe_statics.", "mlp.gate.moe_statics."),),
        shared="mlp.shared_experts",
        shared_count="moe_num_shared_experts",
    ),
    kinds_of=_kinds,
    in_float32=("mlp.gate.weight", "mlp.gate.moe_statics.e_score_correction_bias"),
)
