"""Modules that a quantized model is made of."""

from mxrot.layers.linear import QuantLinear
from mxrot.layers.prepare import prepare_site
from mxrot.layers.product import TensorQuantizer
from mxrot.layers.site import SiteProducts
from mxrot.layers.sites import prepare_linears, prepare_on_gpus, sites_of
from mxrot.layers.size import ModelSize
from mxrot.layers.transform import InputTransform

__all__ = [
    "InputTransform",
    "ModelSize",
    "QuantLinear",
    "SiteProducts",
    "TensorQuantizer",
    "prepare_linears",
    "prepare_on_gpus",
    "prepare_site",
    "sites_of",
]
