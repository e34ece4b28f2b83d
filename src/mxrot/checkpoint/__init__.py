"""Checkpoint folders: the compressed-tensors layout, written block by block and read back."""

from mxrot.checkpoint.card import write_metrics
from mxrot.checkpoint.config import check_exportable
from mxrot.checkpoint.huggingface import with_config
from mxrot.checkpoint.reader import is_checkpoint, load
from mxrot.checkpoint.writer import check_output, quantize_to_folder

__all__ = [
    "check_exportable",
    "check_output",
    "is_checkpoint",
    "load",
    "quantize_to_folder",
    "with_config",
    "write_metrics",
]
