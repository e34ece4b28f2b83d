"""Modules that a quantized model is made of."""

from mxrot.layers.linear import InputTransform, QuantLinear, TensorQuantizer, prepare_linears
from mxrot.layers.size import ModelSize

__all__ = ["InputTransform", "ModelSize", "QuantLinear", "TensorQuantizer", "prepare_linears"]
