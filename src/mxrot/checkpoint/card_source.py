"""What a model card says about the model that was quantized."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from mxrot.models import commit_of


@dataclass(frozen=True)
class Source:
    """The model that was quantized, as a card describes it."""

    name: str
    """The hub id, or the name of the folder."""
    hub_id: str | None = None
    """None if it is not known."""
    licence: dict[str, str] = field(default_factory=dict)
    """`license`, `license_name` and `license_link` from the model's own card, if it has them."""
    commit: str | None = None
    """The commit on the hub, if the hub's cache knows it."""


def describe_source(name: str, folder: Path) -> Source:
    """The model called `name` in `folder`, with facts from its own card.

    A folder that holds a quantized form of a model on the hub counts as that model.
    """
    try:
        data = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.to_dict()
    except Exception:  # written by others: a card that is wrong in any way gives no facts
        data = {}
    fields = {key: data.get(key) for key in ("license", "license_name", "license_link")}
    licence = {key: value for key, value in fields.items() if isinstance(value, str)}
    hub_id = data.get("base_model") if data.get("base_model_relation") == "quantized" else name
    return Source(name, hub_id if _is_hub_id(hub_id) else None, licence, commit_of(folder))


def _is_hub_id(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
