"""Checkpoint folders in the compressed-tensors layout: written block by block, and read back.

Names are imported when they are first used, because code that only inspects a folder needs no writer.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mxrot.checkpoint.card_figures import write_metrics
    from mxrot.checkpoint.config import check_exportable
    from mxrot.checkpoint.fingerprint import hash_model
    from mxrot.checkpoint.huggingface import with_config
    from mxrot.checkpoint.output import check_output
    from mxrot.checkpoint.reader import is_checkpoint, load
    from mxrot.checkpoint.record import has_run, read_run
    from mxrot.checkpoint.writer import quantize_to_folder

__all__ = [
    "check_exportable",
    "check_output",
    "has_run",
    "hash_model",
    "is_checkpoint",
    "load",
    "quantize_to_folder",
    "read_run",
    "with_config",
    "write_metrics",
]

_HOME = {
    "check_exportable": "config",
    "check_output": "output",
    "has_run": "record",
    "hash_model": "fingerprint",
    "is_checkpoint": "reader",
    "load": "reader",
    "quantize_to_folder": "writer",
    "read_run": "record",
    "with_config": "huggingface",
    "write_metrics": "card_figures",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mxrot.checkpoint' has no attribute {name!r}")
    return getattr(import_module(f"mxrot.checkpoint.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
