"""A tiny config of each model family, from what transformers' class of its configs has. No family is named here."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import transformers

from mxrot.models import Family
from mxrot.models.family import LAYER_TYPES

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
}
EXPERTS = {
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 128,
    "n_group": 1,
    "topk_group": 1,
}
FIRST_IS_DENSE = {"mlp_only_layers": [0], "first_k_dense_replace": 1, "moe_layer_start_index": 1}
"""In the words of all configs: the second block has experts."""
THAT_COUNT = {
    "logits_scaling": 8.0,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.2,
    "attention_multiplier": 0.1,
    "final_logit_softcapping": 0.5,
    "attn_logit_softcapping": 0.2,
    "query_pre_attn_scalar": 24,
    "logit_scale": 0.3,
    "swiglu_limit": 0.05,
}
"""Factors, and bounds that a random model reaches, for configs in which they have a value."""
LATENT = {
    "num_key_value_heads": SIZES["num_attention_heads"],
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 16,
}
"""Of multi-head latent attention: keys are wider than values."""
INDEXER = {"index_topk": 16, "index_head_dim": 16, "index_n_heads": 8, "indexer_types": ["full", "shared"]}
"""Of attention to tokens that are chosen: fewer than there are, and for a block without an indexer, too."""
WIDER_WHERE_FULL = {"global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
"""Of blocks that attend to everything beside others with narrower heads."""
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
"""Of gated delta nets: several heads of values share one of keys."""
MAMBA = {
    "mamba_expand": 2,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 2),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size"), 16),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),
}
"""Of Mamba 2, in the words of all configs: chunks that are shorter than the texts, and norms in two groups."""
CHOSEN = {
    "position_embedding_type": "rope",
    "no_rope_layer_interval": 2,
    "shared_intermediate_size": 96,
    "attn_layer_indices": [1],
    "block_auto_adjust_ff_dim": False,
    "num_dense_layers": 1,
    "moe_latent_size": 32,
    "moe_shared_expert_intermediate_size": 128,
}
"""Values that make blocks of each kind, and of small ones."""


VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_attention_heads": 2,
    "num_heads": 2,
    "head_dim": 16,
    "image_size": 16,
    "patch_size": 4,
    "num_position_embeddings": 16,
    "out_hidden_size": SIZES["hidden_size"],
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [1],
    "num_key_value_heads": 2,
    "pooling_kernel_size": 2,
    "standardize": True,
    "position_embedding_size": 16,
}
"""Of a vision tower that sees images of 4 by 4 patches."""
BESIDE = {
    "mm_tokens_per_image": 4,
    **dict.fromkeys(("image_token_id", "image_token_index"), 49),
    **dict.fromkeys(("video_token_id", "vision_start_token_id", "vision_end_token_id"), 48),
}
"""Of what projects its outputs, and tokens that stand for images, in the words of all configs."""
CHANGED: dict[str, dict[str, Any]] = {}
"""Other values that a test has chosen for a while, by the name of the family."""
OF_BOTH = ("tie_word_embeddings",)
"""Keys that a model of more than text and its text model have."""


def settings_of(family: Family) -> dict[str, Any]:
    """A config of two blocks, or of one of each kind, with grouped queries, as `AutoConfig.for_model` takes it; of the
    text model, where there is more."""
    kind: Any = getattr(transformers, family.architectures[0]).config_class
    if family.beside is not None:
        kind = transformers.CONFIG_MAPPING[family.beside.text_types[0]]
    default: Any = kind()
    found = (
        SIZES
        | CHOSEN
        | DELTA
        | MAMBA
        | {key: value for key, value in THAT_COUNT.items() if getattr(default, key, None) is not None}
    )
    if family.experts is not None:
        found |= {family.experts.count: 4, family.experts.each: 2} | EXPERTS | FIRST_IS_DENSE
        if family.experts.may_lack:
            found["enable_moe_block"] = True
        if hasattr(default, "moe_intermediate_size"):
            found["intermediate_size"] = 160  # of blocks without experts
    for key, token in (("pad_token_id", 0), ("bos_token_id", 2)):
        if (getattr(default, key, None) or 0) >= SIZES["vocab_size"]:
            found[key] = token
    rope = getattr(default, "rope_parameters", None) or {}
    if getattr(kind, "ignore_keys_at_rope_validation", None) and "mrope_section" in kind.ignore_keys_at_rope_validation:
        found["rope_parameters"] = rope | {"rope_type": "default", "mrope_section": [4, 2, 2]}
        if "partial_rotary_factor" in rope:
            found["rope_parameters"] |= {"partial_rotary_factor": 0.5}  # so that each axis turns some
    if "original_max_position_embeddings" in rope:
        found["rope_parameters"] = rope | {"original_max_position_embeddings": 16}
    if getattr(default, "is_heterogeneous", False):
        found |= WIDER_WHERE_FULL
    if hasattr(default, "kv_lora_rank"):
        found |= LATENT | INDEXER
    found = {key: value for key, value in found.items() if _has(default, key)}
    found |= dict(family.holds_for)
    kinds = getattr(kind(**found), "layer_types", None) or ()
    wanted = [kind for kind in family.layer_types if kind not in LAYER_TYPES]
    if wanted and "full_attention" in family.layer_types:
        wanted.append("full_attention")
        found |= {} if list(kinds) == wanted else {"layer_types": wanted}
    elif not wanted and "linear_attention" in kinds:
        found["layer_types"] = ["full_attention"] * 2
    if "sliding_attention" in kinds:
        found |= {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    return {"model_type": kind.model_type, **found, **CHANGED.get(family.name, {})}


def _has(config: Any, key: str) -> bool:
    """Does a config know a key, for the model or for some of its blocks?"""
    with suppress(RuntimeError):  # of values that blocks say for themselves
        return hasattr(config, key) or (key in WIDER_WHERE_FULL and getattr(config, "is_heterogeneous", False))
    return True


def config_of(family: Family, **changes: Any) -> Any:
    """The same as a config, with some values replaced."""
    settings = settings_of(family) | changes
    if "mamba_n_heads" in settings:
        settings["mamba_n_heads"] = settings["mamba_expand"] * settings["hidden_size"] // settings["mamba_d_head"]
    if "mrope_section" in settings.get("rope_parameters", {}):
        turned = settings["rope_parameters"].get("partial_rotary_factor", 1.0)
        half = int(settings["hidden_size"] // settings["num_attention_heads"] * turned) // 2
        settings["rope_parameters"] |= {"mrope_section": [half // 2, half // 4, half // 4]}
    if family.beside is not None:
        whole = getattr(transformers, family.architectures[0]).config_class
        default: Any = whole()
        vision = default.vision_config or default.sub_configs_defaults["vision_config"].config_class()
        beside = {key: value for key, value in BESIDE.items() if hasattr(default, key)}
        settings = {
            **{key: changes[key] for key in OF_BOTH if key in changes},
            **beside,
            "model_type": whole.model_type,
            "text_config": {"eos_token_id": SIZES["eos_token_id"], **settings},
            "vision_config": {
                "model_type": vision.model_type,
                **{key: value for key, value in VISION.items() if hasattr(vision, key)},
            },
        }
    return transformers.AutoConfig.for_model(
        settings.pop("model_type"), architectures=[family.architectures[0]], **settings
    )


def auto_class(family: Family) -> Any:
    """transformers' class that builds models of a family."""
    return getattr(transformers, family.auto_class)


def inner_width(family: Family) -> str:
    """What the config calls the inputs of the MLP's last linear."""
    names = ("moe_intermediate_size", "intermediate_size")
    return next(name for name in names if name in settings_of(family))
