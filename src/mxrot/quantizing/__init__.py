"""Quantize a model, block by block."""

from mxrot.quantizing.run import BlockStore, QuantizedModel, quantize

__all__ = ["BlockStore", "QuantizedModel", "quantize"]
