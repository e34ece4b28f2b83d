"""MiniMax M2: Mixtral's experts, chosen by sigmoids with a bias; norms over all queries and over all keys."""

from mxrot.models.expert_names import ExpertNames
from mxrot.models.families.llama import ATTENTION_SITES
from mxrot.models.family import Family

FAMILY = Family(
    "minimax_m2",
    ("MiniMaxM2ForCausalLM",),
    ATTENTION_SITES,
    norm_class="MiniMaxM2RMSNorm",
    rotation_obstacle=None,
    experts=ExpertNames(
        "MiniMaxM2Experts", "num_local_experts", ("w1", "w3", "w2"), renamed=(("block_sparse_moe.", "mlp."),)
    ),
)
