"""Checkpoint folders: the compressed-tensors layout, written block by block and read back."""

from mxrot.checkpoint.config import check_exportable
from mxrot.checkpoint.export import export_for_vllm
from mxrot.checkpoint.huggingface import with_config
from mxrot.checkpoint.reader import is_checkpoint, load
from mxrot.checkpoint.serving import VllmReport, check_for_vllm
from mxrot.checkpoint.writer import check_output, quantize_to_folder

__all__ = [
    "VllmReport",
    "check_exportable",
    "check_for_vllm",
    "check_output",
    "export_for_vllm",
    "is_checkpoint",
    "load",
    "quantize_to_folder",
    "with_config",
]
