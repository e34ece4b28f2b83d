"""What people look at: tables, progress, and a page with pictures."""

from mxrot.progress.display import ProgressOption, progress_on_stderr, shown_progress
from mxrot.report.compared_page import Comparison, compared_page
from mxrot.report.compared_plots import compared_pictures
from mxrot.report.contents import Contents
from mxrot.report.drawing import check_matplotlib, write_files
from mxrot.report.html import page
from mxrot.report.metrics import metrics_of, read_results
from mxrot.report.plans import kept_line, plan_report
from mxrot.report.plots import pictures
from mxrot.report.rows import ComparedRow, Run
from mxrot.report.side_by_side import csv_text, remarks, side_by_side
from mxrot.report.tables import (
    changes_line,
    choice_line,
    choices_table,
    compared_tasks_table,
    comparison_table,
    divergence_table,
    errors_table,
    experts_line,
    family_line,
    head_line,
    left_line,
    maxima_table,
    passed_line,
    perplexity_table,
    rank_line,
    recipe_line,
    recovery_table,
    rotation_line,
    sites_choice_line,
    size_line,
    tasks_table,
    tuning_line,
)
from mxrot.report.texts import text_lines
from mxrot.report.trade_off import picture_file
from mxrot.report.vllm import print_vllm_report

__all__ = [
    "ComparedRow",
    "Comparison",
    "Contents",
    "ProgressOption",
    "Run",
    "changes_line",
    "check_matplotlib",
    "choice_line",
    "choices_table",
    "compared_page",
    "compared_pictures",
    "compared_tasks_table",
    "comparison_table",
    "csv_text",
    "divergence_table",
    "errors_table",
    "experts_line",
    "family_line",
    "head_line",
    "kept_line",
    "left_line",
    "maxima_table",
    "metrics_of",
    "page",
    "passed_line",
    "perplexity_table",
    "picture_file",
    "pictures",
    "plan_report",
    "print_vllm_report",
    "progress_on_stderr",
    "rank_line",
    "read_results",
    "recipe_line",
    "recovery_table",
    "remarks",
    "rotation_line",
    "shown_progress",
    "side_by_side",
    "sites_choice_line",
    "size_line",
    "tasks_table",
    "text_lines",
    "tuning_line",
    "write_files",
]
