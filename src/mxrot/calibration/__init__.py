"""Forward passes with hooks, and the statistics they leave behind."""

from mxrot.calibration.block_inputs import BlockInputs
from mxrot.calibration.capture import (
    advance,
    finish_child,
    observe_all_inputs,
    observe_inputs,
    paired_inputs,
    watched_together,
)
from mxrot.calibration.first_block import block_arguments, first_block_inputs, first_hidden
from mxrot.calibration.generation import generated_windows
from mxrot.calibration.hooks import watched_inputs
from mxrot.calibration.routing import Routing
from mxrot.calibration.statistics import (
    COLLECTORS,
    ChannelMaxima,
    Collector,
    CrossMoment,
    Hessian,
    LargestMagnitude,
    RowSample,
)
from mxrot.calibration.world import ONE, World

__all__ = [
    "COLLECTORS",
    "ONE",
    "BlockInputs",
    "ChannelMaxima",
    "Collector",
    "CrossMoment",
    "Hessian",
    "LargestMagnitude",
    "Routing",
    "RowSample",
    "World",
    "advance",
    "block_arguments",
    "finish_child",
    "first_block_inputs",
    "first_hidden",
    "generated_windows",
    "observe_all_inputs",
    "observe_inputs",
    "paired_inputs",
    "watched_inputs",
    "watched_together",
]
