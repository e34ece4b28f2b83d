"""Forward passes with hooks, and the statistics that they collect."""

from mxrot.calibration.executor import Executor
from mxrot.calibration.first_block import block_arguments, first_executor, first_hidden
from mxrot.calibration.generation import generated_windows
from mxrot.calibration.handing import handed_out
from mxrot.calibration.hooks import watched_inputs
from mxrot.calibration.manner import Manner
from mxrot.calibration.routing import Routing
from mxrot.calibration.statistics import (
    COLLECTORS,
    ChannelMaxima,
    ChannelSquares,
    Collector,
    CrossMoment,
    Hessian,
    LargestMagnitude,
    RowSample,
)
from mxrot.calibration.world import ONE, SideBySide, World

__all__ = [
    "COLLECTORS",
    "ONE",
    "ChannelMaxima",
    "ChannelSquares",
    "Collector",
    "CrossMoment",
    "Executor",
    "Hessian",
    "LargestMagnitude",
    "Manner",
    "Routing",
    "RowSample",
    "SideBySide",
    "World",
    "block_arguments",
    "first_executor",
    "first_hidden",
    "generated_windows",
    "handed_out",
    "watched_inputs",
]
