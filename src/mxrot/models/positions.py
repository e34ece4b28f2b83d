"""How many tokens a model was made for, and how many of them each decoder block looks back at."""

from __future__ import annotations

from typing import Any

from mxrot.models.family import Family


def position_count(config: Any) -> int | None:
    """Positions that a model was made for, with stretched rotary embeddings too; None where its config says none."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int):
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    factor, before = rope.get("factor"), rope.get("original_max_position_embeddings")
    if isinstance(factor, (int, float)) and isinstance(before, int):
        return max(positions, int(factor * before))
    return positions


def block_windows(config: Any, family: Family) -> tuple[int | None, ...]:
    """Of each decoder block how many tokens it attends to, that of the query included; None for all."""
    text = config.get_text_config()
    window, count = getattr(text, "sliding_window", None), int(text.num_hidden_layers)
    kinds = getattr(text, "layer_types", None) or ("full_attention",) * count
    if family.windows == "none" or window is None:
        return (None,) * count
    if family.windows == "all":
        return (int(window),) * count
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)
