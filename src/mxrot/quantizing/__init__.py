"""Quantize a model, block by block."""

from mxrot.quantizing.run import QuantizedModel, quantize
from mxrot.quantizing.store import BlockStore

__all__ = ["BlockStore", "QuantizedModel", "quantize"]
