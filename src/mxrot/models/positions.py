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
    """Of each decoder block how many tokens it attends to, that of the query included; None for all, 0 where the block
    has no attention. `family` as of a model."""
    text = config.get_text_config()
    window, count = getattr(text, "sliding_window", None), int(text.num_hidden_layers)
    kinds = getattr(text, "layer_types", None) or ("full_attention",) * count
    found: list[int | None] = [None] * count
    if family.windows == "all" and window is not None:
        found = [int(window)] * count
    elif family.windows == "by kind" and window is not None:
        found = [int(window) if kind == "sliding_attention" else None for kind in kinds]
    return tuple(one if family.attends(index) else 0 for index, one in enumerate(found))
