"""GLM 5: as DeepSeek V3.2. From 5.2 on most blocks have no indexer, and take the tokens that the block before took."""

from dataclasses import replace
from typing import Any

from mxrot.models.expert_names import ExpertNames
from mxrot.models.families.deepseek_v3 import latent_sites
from mxrot.models.families.deepseek_v32 import FAMILY as V32
from mxrot.models.families.deepseek_v32 import indexed_sites, kinds_by_list
from mxrot.models.family import PassedOn, Site

INDEXED, SHARING = "indexed", "sharing"
"""Blocks with an indexer, and without."""


def _kinds(config: Any) -> tuple[str, ...]:
    """Blocks share as `indexer_types` says, and have experts as `mlp_layer_types` does."""
    indexers = (SHARING if kind == "shared" else INDEXED for kind in config.indexer_types)
    return tuple(f"{mlp} {indexer}" for mlp, indexer in zip(kinds_by_list(config), indexers, strict=True))


def _sites(config: Any) -> tuple[Site, ...]:
    """Of attention, as blocks of both kinds have them."""
    both = zip(indexed_sites(config), latent_sites(config), strict=True)
    return tuple(
        site
        for with_indexer, without in both
        for site in (
            (without,)
            if with_indexer == without
            else (replace(with_indexer, only_in=INDEXED), replace(without, only_in=SHARING))
        )
    )


FAMILY = replace(
    V32,
    name="glm_moe_dsa",
    architectures=("GlmMoeDsaForCausalLM",),
    attention_sites_of=_sites,
    norm_class="GlmMoeDsaRMSNorm",
    experts=ExpertNames(
        "GlmMoeDsaExperts", "n_routed_experts", ("gate_proj", "up_proj", "down_proj"), shared="mlp.shared_experts"
    ),
    kinds_of=_kinds,
    passes_on=PassedOn("prev_topk_indices", "index_topk"),
)
