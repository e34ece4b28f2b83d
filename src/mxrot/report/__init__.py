"""What people look at: tables and progress."""

from mxrot.report.progress import progress_on_stderr
from mxrot.report.tables import (
    ComparedRow,
    choices_table,
    compared_tasks_table,
    comparison_table,
    divergence_table,
    errors_table,
    maxima_table,
    perplexity_table,
    size_line,
    tasks_table,
    tuning_line,
)

__all__ = [
    "ComparedRow",
    "choices_table",
    "compared_tasks_table",
    "comparison_table",
    "divergence_table",
    "errors_table",
    "maxima_table",
    "perplexity_table",
    "progress_on_stderr",
    "size_line",
    "tasks_table",
    "tuning_line",
]
