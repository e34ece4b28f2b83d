"""Measurements of speed, side by side in one run, and only of code that gives correct results."""

from mxrot.bench.cache import HeadShapes, bench_cache, cache_scheme, sizes_of
from mxrot.bench.kernels import LLAMA_3_8B, ROWS, KernelRow, bench_kernels, measured_crossovers
from mxrot.bench.look_up import LOOK_UP_COUNTS, bench_look_up
from mxrot.bench.model import ModelRow, Works, bench_model, llama_config, random_model
from mxrot.bench.model_tables import breakdown_tables, model_lines, model_table
from mxrot.bench.others import absent_others
from mxrot.bench.quantize import QuantizeRow, bench_quantize
from mxrot.bench.tables import best_tiles, geometric_means, kernel_table, quantize_table
from mxrot.bench.timing import Seconds, ceilings, copy_speed, seconds_of

__all__ = [
    "LLAMA_3_8B",
    "LOOK_UP_COUNTS",
    "ROWS",
    "HeadShapes",
    "KernelRow",
    "ModelRow",
    "QuantizeRow",
    "Seconds",
    "Works",
    "absent_others",
    "bench_cache",
    "bench_kernels",
    "bench_look_up",
    "bench_model",
    "bench_quantize",
    "best_tiles",
    "breakdown_tables",
    "cache_scheme",
    "ceilings",
    "copy_speed",
    "geometric_means",
    "kernel_table",
    "llama_config",
    "measured_crossovers",
    "model_lines",
    "model_table",
    "quantize_table",
    "random_model",
    "seconds_of",
    "sizes_of",
]
