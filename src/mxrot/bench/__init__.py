"""Speed, measured side by side in one run, and only of what computes the right thing."""

from mxrot.bench.kernels import LLAMA_3_8B, ROWS, KernelRow, bench_kernels, measured_crossovers
from mxrot.bench.model import ModelRow, bench_model, llama_config, random_model
from mxrot.bench.quantize import QuantizeRow, bench_quantize
from mxrot.bench.tables import geometric_means, kernel_table, model_table, quantize_table
from mxrot.bench.timing import Seconds, ceilings, seconds_of

__all__ = [
    "LLAMA_3_8B",
    "ROWS",
    "KernelRow",
    "ModelRow",
    "QuantizeRow",
    "Seconds",
    "bench_kernels",
    "bench_model",
    "bench_quantize",
    "ceilings",
    "geometric_means",
    "kernel_table",
    "llama_config",
    "measured_crossovers",
    "model_table",
    "quantize_table",
    "random_model",
    "seconds_of",
]
