"""Modules that a quantized model is made of."""

from mxrot.layers.linear import InputTransform, QuantLinear
from mxrot.layers.prepare import prepare_linears, prepare_site, sites_of
from mxrot.layers.product import TensorQuantizer
from mxrot.layers.site import SiteProducts
from mxrot.layers.size import ModelSize

__all__ = [
    "InputTransform",
    "ModelSize",
    "QuantLinear",
    "SiteProducts",
    "TensorQuantizer",
    "prepare_linears",
    "prepare_site",
    "sites_of",
]
