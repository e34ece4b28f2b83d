"""Modules that a quantized model is made of."""

from mxrot.layers.linear import InputTransform, QuantLinear, TensorQuantizer
from mxrot.layers.size import ModelSize

__all__ = ["InputTransform", "ModelSize", "QuantLinear", "TensorQuantizer"]
