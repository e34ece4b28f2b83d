"""How a `quantization_config` of mxrot is recognized. Imports nothing, because `import torch` loads this module."""

from __future__ import annotations

MARKER = "mxrot"
"""The key of the table that only mxrot writes."""
SAVED_BY = "saved_by"
"""The key in the marker that says `save_pretrained` has written last."""
METHOD = "compressed-tensors"
"""The `quant_method` of a checkpoint."""
NATIVE = "mxrot"
"""The `format` of a checkpoint, and of its config groups, that only mxrot reads."""
ON_LOAD = "mxrot"
"""The `quant_method` of `mxrot.MxrotConfig`."""
IN_VLLM = "mxrot"
"""The name of the quantization method in vLLM, with the plugin."""


def is_ours(table: object) -> bool:
    """True if a `quantization_config` has mxrot's marker, its `format`, or transforms with mxrot's names.

    With the others but without the marker, the config is damaged: another reader would leave the transforms out.
    """
    if not isinstance(table, dict):
        return False
    if MARKER in table or table.get("format") == NATIVE:
        return True
    transforms = table.get("transform_config")
    schemes, groups = _tables_in(transforms), _tables_in(table)
    return any(map(_is_scheme, schemes)) or any(_is_native(group) for group in groups.values())


def _tables_in(table: object) -> dict[object, object]:
    groups = table.get("config_groups") if isinstance(table, dict) else None
    return groups if isinstance(groups, dict) else {}


def _is_native(group: object) -> bool:
    return isinstance(group, dict) and group.get("format") == NATIVE


def _is_scheme(name: object) -> bool:
    """True if the name has the form layer<i>_<site>."""
    start, _, site = str(name).partition("_")
    return start.startswith("layer") and start[5:].isdigit() and bool(site)
