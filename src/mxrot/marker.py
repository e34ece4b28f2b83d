"""How a `quantization_config` is known to be ours. Imports nothing: it is looked at wherever torch is imported."""

from __future__ import annotations

MARKER = "mxrot"
"""The key of what mxrot alone writes."""
SAVED_BY = "saved_by"
"""What the marker says where `save_pretrained` has written last."""
METHOD = "compressed-tensors"
"""The `quant_method` of a checkpoint."""
ON_LOAD = "mxrot"
"""The `quant_method` of `mxrot.MxrotConfig`."""


def is_ours(table: object) -> bool:
    """Does a `quantization_config` carry mxrot's marker, or transforms that go by mxrot's names?

    With these and without the marker it was damaged: another reader would leave the transforms out.
    """
    if not isinstance(table, dict):
        return False
    transforms = table.get("transform_config")
    schemes = transforms.get("config_groups") if isinstance(transforms, dict) else None
    return MARKER in table or (isinstance(schemes, dict) and any(map(_is_scheme, schemes)))


def _is_scheme(name: object) -> bool:
    """Is it called layer<i>_<site>?"""
    start, _, site = str(name).partition("_")
    return start.startswith("layer") and start[5:].isdigit() and bool(site)
