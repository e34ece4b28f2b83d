"""run.json as tables and reports take it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mxrot.documents import read_json
from mxrot.errors import CheckpointError
from mxrot.marker import MARKER, SAVED_BY

_NUMBER = (int, float)
_MAYBE = (int, float, type(None))
_CHECKS: Any = [{"step": int, "held_out": _NUMBER}]
_LINEAR = {"name": str, "shape": [int], "weight_error": _NUMBER, "output_error": _MAYBE, "damping": _MAYBE}
_TRIAL = {"candidate": str, "nats_per_token": dict, "score": _NUMBER, "is_kept": bool}
_PLAIN: dict[str, Any] = {
    "data": dict,
    "windows": [int],
    "rotation_losses": [_NUMBER],
    "choice": [_TRIAL],
    "left_out_of_recipe": [str],
    "head": _LINEAR,
    "passed_over": str,
    "family": {"name": str, "sites": [{"name": str, "linears": [str]}]},
}
_SIZE = ("code_bytes", "scale_bytes", "transform_bytes", "other_bytes", "quantized_weights", "total_bytes")
_RUN: dict[str, Any] = {
    "model": str,
    "seed": int,
    "seconds": _NUMBER,
    "device": str,
    "versions": dict,
    "size": {**dict.fromkeys(_SIZE, int), "bits_per_weight": _NUMBER},
    "blocks": [{"index": int, "seconds": _NUMBER, "linears": [_LINEAR]}],
    "files": dict,
}
"""What must be there: a type, several, a list of one kind, or a table with at least these keys."""


def has_run(folder: Path) -> bool:
    """Is there a run.json in a checkpoint, and of what is in it now?"""
    return (folder / "run.json").exists() and not _was_saved_again(folder)


def _was_saved_again(folder: Path) -> bool:
    """Has `save_pretrained` written last?"""
    return SAVED_BY in read_json(folder / "config.json")["quantization_config"][MARKER]


def read_run(folder: Path) -> dict[str, Any]:
    """run.json of a checkpoint; CheckpointError names what is missing in it, or of another type, or says that it is of
    what was there before `save_pretrained` wrote."""
    path = folder / "run.json"
    if path.exists() and _was_saved_again(folder):
        raise CheckpointError(
            f"{path}: describes what was here before save_pretrained; take a folder that only `mxrot quantize` has "
            "written"
        )
    run = read_json(path)
    _check(run, _RUN, str(path))
    for index, block in enumerate(run["blocks"]):
        if block.get("tuning") is not None:
            _check(block["tuning"], _CHECKS, f"{path}: blocks.{index}.tuning")
        _check(block.get("few_tokens", {}), dict, f"{path}: blocks.{index}.few_tokens")
        for linear in block["linears"]:
            if len(linear["shape"]) != 2:
                raise CheckpointError(f"{path}: blocks.{index}: a linear has the shape {linear['shape']!r}")
    if run.get("tuning") is not None:
        _check(run["tuning"], _CHECKS, f"{path}: tuning")
    for key, kind in _PLAIN.items():
        if run.get(key) is not None:
            _check(run[key], kind, f"{path}: {key}")
    return run


def _check(found: Any, wanted: Any, where: str) -> None:
    if isinstance(wanted, dict):
        _check(found, dict, where)
        for key, inner in wanted.items():
            if key not in found:
                raise CheckpointError(f"{where}: has no {key!r}")
            _check(found[key], inner, f"{where}: {key}")
    elif isinstance(wanted, list):
        _check(found, list, where)
        for item in found:
            _check(item, wanted[0], where)
    elif isinstance(found, bool) is not (wanted is bool) or not isinstance(found, wanted):
        kinds = wanted if isinstance(wanted, tuple) else (wanted,)
        named = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in kinds)
        raise CheckpointError(f"{where}: expected {named}, got {repr(found)[:100]}")
