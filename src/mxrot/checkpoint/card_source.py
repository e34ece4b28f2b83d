"""What a model card says of the model that was quantized."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from mxrot.models import commit_of


@dataclass(frozen=True)
class Source:
    """What a card says of the model that was quantized."""

    name: str
    """Hub id, or the name of its folder."""
    hub_id: str | None = None
    """None where it is not known."""
    licence: dict[str, str] = field(default_factory=dict)
    """`license`, `license_name` and `license_link` of its own card, as far as it has them."""
    commit: str | None = None
    """Of the hub, where its cache says so."""


def describe_source(name: str, folder: Path) -> Source:
    """The model called `name` in `folder`, with what its own card says.

    A folder that is a quantized form of a model on the hub counts as that model.
    """
    try:
        data = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.to_dict()
    except Exception:  # somebody else's file: whatever is wrong with it, it says nothing
        data = {}
    fields = {key: data.get(key) for key in ("license", "license_name", "license_link")}
    licence = {key: value for key, value in fields.items() if isinstance(value, str)}
    hub_id = data.get("base_model") if data.get("base_model_relation") == "quantized" else name
    return Source(name, hub_id if _is_hub_id(hub_id) else None, licence, commit_of(folder))


def _is_hub_id(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
