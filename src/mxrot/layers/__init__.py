"""Modules of a quantized model, and parts of models that are computed differently here than in transformers."""

from mxrot.layers.attention import score_heads, shared_heads, step_mask, unmasked
from mxrot.layers.cached_attention import quantize_cache, restore_cache
from mxrot.layers.experts import build_apart, separate_experts
from mxrot.layers.fixed_packed_cache import FixedPackedCache
from mxrot.layers.head import HeadLinear
from mxrot.layers.installed_cache import cache_scheme_of
from mxrot.layers.kv_cache import FixedCache, SpreadCache
from mxrot.layers.linear import QuantLinear
from mxrot.layers.logits import check_logits, logits_of
from mxrot.layers.norms import fused_norms
from mxrot.layers.packed_cache import PackedCache, PackedCacheLayer
from mxrot.layers.packed_tokens import PackedTokens
from mxrot.layers.prepare import prepare_site
from mxrot.layers.quantized_attention import operands_of, quantize_attention, restore_attention
from mxrot.layers.site import SiteProducts
from mxrot.layers.sites import prepare_linears, prepare_on_gpus, sites_of, warm_up_linear
from mxrot.layers.size import ModelSize
from mxrot.layers.transform import InputTransform

__all__ = [
    "FixedCache",
    "FixedPackedCache",
    "HeadLinear",
    "InputTransform",
    "ModelSize",
    "PackedCache",
    "PackedCacheLayer",
    "PackedTokens",
    "QuantLinear",
    "SiteProducts",
    "SpreadCache",
    "build_apart",
    "cache_scheme_of",
    "check_logits",
    "fused_norms",
    "logits_of",
    "operands_of",
    "prepare_linears",
    "prepare_on_gpus",
    "prepare_site",
    "quantize_attention",
    "quantize_cache",
    "restore_attention",
    "restore_cache",
    "score_heads",
    "separate_experts",
    "shared_heads",
    "sites_of",
    "step_mask",
    "unmasked",
    "warm_up_linear",
]
