"""The purpose of a text, and the part of a data set for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from mxrot.errors import DataError

Role = Literal["calibration", "evaluation"]
_SPLITS: dict[Role, tuple[str, ...]] = {
    "calibration": ("train", "training"),
    "evaluation": ("test", "validation", "valid", "dev", "eval"),
}


def split_for(role: Role, names: Iterable[str], where: str) -> str:
    """The split of a data set for a role, or its only split. DataError, with the list of splits, if none fits."""
    known = list(names)
    chosen = next((name for name in _SPLITS[role] if name in known), None)
    if chosen is None and len(known) == 1:
        chosen = known[0]
    if chosen is None:
        raise DataError(f"{where}: none of its splits ({', '.join(known) or 'none'}) is for {role}; name one")
    return chosen
