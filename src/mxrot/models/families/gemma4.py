"""Gemma 4 of text, from 26B on: as Gemma 3, with norms that multiply by their weights.

Blocks that attend to everything have wider heads than those with windows, and make values of the linear of keys. Values
pass a norm of their own in every head, so that no scale and no order of channels goes from v to o. In models with
experts each block has them beside its MLP, behind a norm of their own, and a router that reads the residual stream
through another.

Smaller models, which have an embedding for each block and share keys and values among blocks, are refused.
"""

from dataclasses import replace
from typing import Any

from mxrot.models.expert_names import SPARSE, ExpertNames
from mxrot.models.families.gemma2 import GEMMA_OBSTACLE, GEMMA_SITES
from mxrot.models.family import Family, Kept, Site

WINDOWED, FULL = "windowed", "full"
"""Blocks by what they attend to."""
_PLAIN = {site.name: replace(site, norm_adds_one=False) for site in GEMMA_SITES}


def _kinds(config: Any) -> tuple[str, ...]:
    experts = f" {SPARSE}" if config.num_experts is not None else ""
    return tuple((FULL if kind == "full_attention" else WINDOWED) + experts for kind in config.layer_types)


def _attention_sites(config: Any) -> tuple[Site, ...]:
    """One linear may make both keys and values of blocks that attend to everything (`attention_k_eq_v`)."""
    qkv = _PLAIN["qkv"]
    qk = replace(qkv, linears=qkv.linears[:2], only_in=FULL)
    first = (replace(qkv, only_in=WINDOWED), qk) if config.attention_k_eq_v else (qkv,)
    return (*first, replace(_PLAIN["o"], producer=None, producer_is_value=False))


FAMILY = Family(
    "gemma4",
    ("Gemma4ForCausalLM",),
    (_PLAIN["gate_up"], _PLAIN["down"]),
    attention_sites_of=_attention_sites,
    starts_with_bos=True,
    windows="by kind",
    rotation_obstacle=GEMMA_OBSTACLE,
    values="",
    values_read_by="",
    experts=ExpertNames(
        "Gemma4TextExperts",
        "num_experts",
        ("gate_proj", "up_proj", "down_proj"),
        place="experts",
        routers=(),
        each="top_k_experts",
        norm="pre_feedforward_layernorm_2",
        prefix="expert_",
        may_lack=True,
    ),
    kinds_of=_kinds,
    kept=(
        Kept(
            ("router.proj",),
            "it chooses the experts of a token, behind a norm of its own",
            only_in=SPARSE,
        ),
    ),
    heads_obstacle="its blocks have keys and values of two widths, and values pass a norm in every head",
    holds_for=(("hidden_size_per_layer_input", 0), ("num_kv_shared_layers", 0)),
)
