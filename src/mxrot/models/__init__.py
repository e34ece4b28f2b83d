"""Model families, and how to find and read a model. Names and shapes, no numerics."""

from mxrot.models.attention import score_heads, shared_heads, step_mask, unmasked
from mxrot.models.experts import separate_experts
from mxrot.models.family import Family, LogitKeys, Site, check_linears, linear_problems, value_heads
from mxrot.models.logits import check_logits, logits_of
from mxrot.models.lookup import commit_of, find_config, find_model
from mxrot.models.norms import fused_norms
from mxrot.models.skeleton import (
    FAMILIES,
    build_skeleton,
    check_generation_config,
    fill,
    find_family,
    needed_attention,
    other_types,
    read_block,
    read_config,
    read_generation_config,
    rebuild_buffers,
    start_token,
)
from mxrot.models.tensors import check_depth, check_for_transformers, no_place, quantized_by, tensor_problems
from mxrot.models.weights import WeightFiles

__all__ = [
    "FAMILIES",
    "Family",
    "LogitKeys",
    "Site",
    "WeightFiles",
    "build_skeleton",
    "check_depth",
    "check_for_transformers",
    "check_generation_config",
    "check_linears",
    "check_logits",
    "commit_of",
    "fill",
    "find_config",
    "find_family",
    "find_model",
    "fused_norms",
    "linear_problems",
    "logits_of",
    "needed_attention",
    "no_place",
    "other_types",
    "quantized_by",
    "read_block",
    "read_config",
    "read_generation_config",
    "rebuild_buffers",
    "score_heads",
    "separate_experts",
    "shared_heads",
    "start_token",
    "step_mask",
    "tensor_problems",
    "unmasked",
    "value_heads",
]
