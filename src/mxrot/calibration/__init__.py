"""Texts, forward passes with hooks, and the statistics they leave behind."""

from mxrot.calibration.capture import (
    BlockInputs,
    advance,
    block_arguments,
    finish_child,
    first_block_inputs,
    first_hidden,
    observe_all_inputs,
    observe_inputs,
    paired_inputs,
    watched_inputs,
    watched_together,
)
from mxrot.calibration.generation import generated_windows
from mxrot.calibration.routing import Routing
from mxrot.calibration.statistics import COLLECTORS, ChannelMaxima, Collector, Hessian, LargestMagnitude, RowSample
from mxrot.calibration.text import Text, load_text, token_windows

__all__ = [
    "COLLECTORS",
    "BlockInputs",
    "ChannelMaxima",
    "Collector",
    "Hessian",
    "LargestMagnitude",
    "Routing",
    "RowSample",
    "Text",
    "advance",
    "block_arguments",
    "finish_child",
    "first_block_inputs",
    "first_hidden",
    "generated_windows",
    "load_text",
    "observe_all_inputs",
    "observe_inputs",
    "paired_inputs",
    "token_windows",
    "watched_inputs",
    "watched_together",
]
