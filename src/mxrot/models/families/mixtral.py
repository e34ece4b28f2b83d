"""Mixtral: Llama's attention, and a mixture of experts. Their sites follow from the config."""

from mxrot.models.expert_names import ExpertNames
from mxrot.models.families.llama import ATTENTION_SITES
from mxrot.models.family import Family

FAMILY = Family(
    "mixtral",
    ("MixtralForCausalLM",),
    ATTENTION_SITES,
    norm_class="MixtralRMSNorm",
    rotation_obstacle=None,
    experts=ExpertNames(
        "MixtralExperts", "num_local_experts", ("w1", "w3", "w2"), renamed=(("block_sparse_moe.", "mlp."),)
    ),
)
