"""Granite 4: Mamba 2 or attention, and a dense MLP whose gate and up are one linear; in larger models experts beside
it, which read what it reads. Granite's factors."""

from dataclasses import replace
from typing import Any

from mxrot.models.expert_names import DENSE, SPARSE, ExpertNames
from mxrot.models.families.bamba import (
    ATTENDING,
    attending,
    kinds_by_layer_types,
    mamba_kept,
    mamba_sites,
    mamba_states,
)
from mxrot.models.families.llama import ATTENTION_SITES
from mxrot.models.family import LAYER_TYPES, Family, Kept, Site


def _kinds(config: Any) -> tuple[str, ...]:
    """All blocks have experts, or none."""
    mlp = SPARSE if config.num_local_experts else DENSE
    return tuple(f"{kind} {mlp}" for kind in kinds_by_layer_types(config))


FAMILY = Family(
    "granitemoehybrid",
    ("GraniteMoeHybridForCausalLM",),
    (
        *(
            replace(site, residual=None)
            for site in (*mamba_sites("mamba", "input_layernorm"), *attending(ATTENTION_SITES))
        ),
        Site("gate_up", ("shared_mlp.input_linear",), norm="post_attention_layernorm", only_in=DENSE),
        Site("down", ("shared_mlp.output_linear",), rows_before="shared_mlp.input_linear", only_in=DENSE),
    ),
    attention_in=ATTENDING,
    layer_types=(*LAYER_TYPES, "linear_attention"),
    kinds_of=_kinds,
    kept=(
        mamba_kept("mamba"),
        Kept((), "it chooses the experts of a token", ("block_sparse_moe.router",), only_in=SPARSE),
    ),
    states_of=mamba_states,
    norm_class="GraniteMoeHybridRMSNorm",
    rotation_obstacle=None,
    experts=ExpertNames(
        "GraniteMoeHybridExperts",
        "num_local_experts",
        ("gate_proj", "up_proj", "down_proj"),
        place="block_sparse_moe.experts",
        routers=("block_sparse_moe.router",),
        shared="shared_mlp",
        shared_linears=("input_linear", "output_linear"),
        renamed=(
            ("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
            ("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"),
            ("block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight"),
        ),
    ),
)
