"""Model families, and how to find and read a model. Names and shapes, no numerics."""

from mxrot.models.beside import Beside
from mxrot.models.families import EXPERTS, FAMILIES, families_by_name
from mxrot.models.family import (
    Family,
    LogitKeys,
    PassedOn,
    Site,
    cached_numbers,
    check_linears,
    linear_problems,
    query_width,
    value_heads,
    value_rows,
)
from mxrot.models.lookup import commit_of, find_config, find_model
from mxrot.models.skeleton import (
    build_skeleton,
    check_generation_config,
    fill,
    find_family,
    needed_attention,
    read_config,
    read_generation_config,
    rebuild_buffers,
    rebuild_carried_buffers,
    start_token,
    token_id,
)
from mxrot.models.source import ChangedSource, FolderSource, Source, other_types, read_block, read_outer
from mxrot.models.tensors import check_depth, check_for_transformers, no_place, quantized_by, tensor_problems
from mxrot.models.weights import WeightFiles

__all__ = [
    "EXPERTS",
    "FAMILIES",
    "Beside",
    "ChangedSource",
    "Family",
    "FolderSource",
    "LogitKeys",
    "PassedOn",
    "Site",
    "Source",
    "WeightFiles",
    "build_skeleton",
    "cached_numbers",
    "check_depth",
    "check_for_transformers",
    "check_generation_config",
    "check_linears",
    "commit_of",
    "families_by_name",
    "fill",
    "find_config",
    "find_family",
    "find_model",
    "linear_problems",
    "needed_attention",
    "no_place",
    "other_types",
    "quantized_by",
    "query_width",
    "read_block",
    "read_config",
    "read_generation_config",
    "read_outer",
    "rebuild_buffers",
    "rebuild_carried_buffers",
    "start_token",
    "tensor_problems",
    "token_id",
    "value_heads",
    "value_rows",
]
