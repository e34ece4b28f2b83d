"""What people look at: tables and progress."""

from mxrot.report.plans import plan_report
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

__all__ = [
    "ComparedRow",
    "choices_table",
    "comparison_table",
    "divergence_table",
    "errors_table",
    "maxima_table",
    "perplexity_table",
    "plan_report",
    "progress_on_stderr",
    "size_line",
    "tuning_line",
]
