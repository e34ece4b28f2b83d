"""LFM2 with experts: the first blocks have a plain MLP, the others experts. The router adds a bias to the scores that
it chooses by, in float32."""

from dataclasses import replace
from typing import Any

from mxrot.models.expert_names import DENSE, SPARSE, ExpertNames
from mxrot.models.families.bamba import kinds_by_layer_types
from mxrot.models.families.lfm2 import FAMILY as LFM2
from mxrot.models.families.lfm2 import MLP_SITES, SITES_BESIDE_MLP
from mxrot.models.family import Kept


def _kinds(config: Any) -> tuple[str, ...]:
    """All blocks but the first `num_dense_layers` have experts."""
    return tuple(
        f"{kind} {DENSE if index < config.num_dense_layers else SPARSE}"
        for index, kind in enumerate(kinds_by_layer_types(config))
    )


FAMILY = replace(
    LFM2,
    name="lfm2_moe",
    architectures=("Lfm2MoeForCausalLM",),
    sites=(*SITES_BESIDE_MLP, *(replace(site, only_in=DENSE) for site in MLP_SITES)),
    kinds_of=_kinds,
    kept=(*LFM2.kept, Kept((), "it chooses the experts of a token", ("feed_forward.gate",), only_in=SPARSE)),
    rotary="model.pos_emb",
    norm_class="Lfm2MoeRMSNorm",
    experts=ExpertNames(
        "Lfm2MoeExperts",
        "num_experts",
        ("w1", "w3", "w2"),
        place="feed_forward.experts",
        routers=("feed_forward.gate",),
        norm="ffn_norm",
    ),
    in_float32=("feed_forward.expert_bias",),
)
