"""Model families: one file each, with a constant `FAMILY`; found by looking through this package."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable
from importlib import import_module

from mxrot.errors import FamilyError
from mxrot.models.expert_names import ExpertNames
from mxrot.models.family import Family


def families_by_name(families: Iterable[Family]) -> dict[str, Family]:
    """Families by their names, in the order of these; FamilyError if two have one name or architecture."""
    found: dict[str, Family] = {}
    owner: dict[str, Family] = {}
    for family in sorted(families, key=lambda family: family.name):
        if family.name in found:
            raise FamilyError(f"family {family.name}: there are two of this name in models/families; rename one")
        for architecture in family.architectures:
            if architecture in owner:
                raise FamilyError(
                    f"family {family.name}: names the architecture {architecture}, and so does family "
                    f"{owner[architecture].name}; remove it from one of them"
                )
            owner[architecture] = family
        found[family.name] = family
    return found


FAMILIES = families_by_name(
    import_module(f"{__name__}.{module.name}").FAMILY for module in pkgutil.iter_modules(__path__)
)
EXPERTS: dict[str, ExpertNames] = {
    family.experts.fused: family.experts for family in FAMILIES.values() if family.experts is not None
}
"""By transformers' class that holds all experts of a block."""
