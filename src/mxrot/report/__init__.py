"""What people look at: tables and progress."""

from mxrot.report.progress import progress_on_stderr
from mxrot.report.tables import (
    ComparedRow,
    choices_table,
    comparison_table,
    divergence_table,
    errors_table,
    maxima_table,
    perplexity_table,
    size_line,
    tuning_line,
)
from mxrot.report.vllm import print_vllm_report

__all__ = [
    "ComparedRow",
    "choices_table",
    "comparison_table",
    "divergence_table",
    "errors_table",
    "maxima_table",
    "perplexity_table",
    "print_vllm_report",
    "progress_on_stderr",
    "size_line",
    "tuning_line",
]
