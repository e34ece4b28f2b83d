"""Number formats: elements, block scales and quantized tensors. The functions take and return tensors."""

from mxrot.formats.block import (
    as_blocks,
    check_finite,
    check_parts,
    choose_parts,
    encode_blocks,
    fake_quantize,
    quantize,
    round_blocks,
)
from mxrot.formats.block_scales import BlockScales
from mxrot.formats.cache import CacheScheme, CacheTransform
from mxrot.formats.catalog import FORMATS, Format, get_format
from mxrot.formats.element import Element
from mxrot.formats.exponents import E8M0_MAX_BYTE
from mxrot.formats.grid import Grid, Uniform
from mxrot.formats.look_up_table import LookUpTable
from mxrot.formats.operands import AttentionOperands
from mxrot.formats.packing import pack_codes, unpack_codes
from mxrot.formats.parts import NamedParts, Parts, PartSpec
from mxrot.formats.qtensor import QTensor
from mxrot.formats.quantizer import TensorQuantizer
from mxrot.formats.scale import RULES, ScaleRule, get_rule

__all__ = [
    "E8M0_MAX_BYTE",
    "FORMATS",
    "RULES",
    "AttentionOperands",
    "BlockScales",
    "CacheScheme",
    "CacheTransform",
    "Element",
    "Format",
    "Grid",
    "LookUpTable",
    "NamedParts",
    "PartSpec",
    "Parts",
    "QTensor",
    "ScaleRule",
    "TensorQuantizer",
    "Uniform",
    "as_blocks",
    "check_finite",
    "check_parts",
    "choose_parts",
    "encode_blocks",
    "fake_quantize",
    "get_format",
    "get_rule",
    "pack_codes",
    "quantize",
    "round_blocks",
    "unpack_codes",
]
