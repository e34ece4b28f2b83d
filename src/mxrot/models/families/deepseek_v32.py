"""DeepSeek V3.2: as V3, and attention reads the tokens that an indexer chooses: 2,048 of all.

The indexer has three small linears. They read what attention reads and are kept as they are, like routers: what they
give is compared, and a token that is not chosen is not seen at all.
"""

from dataclasses import replace
from typing import Any

from mxrot.models.expert_names import DENSE, SPARSE, ExpertNames
from mxrot.models.families.deepseek_v3 import FAMILY as V3
from mxrot.models.families.deepseek_v3 import latent_sites
from mxrot.models.family import Site

INDEXER = "self_attn.indexer"


def indexed_sites(config: Any) -> tuple[Site, ...]:
    """Of attention, with the linears of the indexer."""
    readers = {"qkv_a": (f"{INDEXER}.wk", f"{INDEXER}.weights_proj"), "q_b": (f"{INDEXER}.wq_b",)}
    return tuple(replace(site, routers=readers.get(site.name, ())) for site in latent_sites(config))


def kinds_by_list(config: Any) -> tuple[str, ...]:
    """Blocks have experts as `mlp_layer_types` says."""
    return tuple(SPARSE if kind == SPARSE else DENSE for kind in config.mlp_layer_types)


FAMILY = replace(
    V3,
    name="deepseek_v32",
    architectures=("DeepseekV32ForCausalLM",),
    attention_sites_of=indexed_sites,
    norm_class="DeepseekV32RMSNorm",
    experts=ExpertNames(
        "DeepseekV32Experts", "n_routed_experts", ("gate_proj", "up_proj", "down_proj"), shared="mlp.shared_experts"
    ),
    kinds_of=kinds_by_list,
    layer_types=("indexed_attention",),
)
