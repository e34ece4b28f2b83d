"""What follows a run from outside: a limit of time, and files that hear of each finished block and look of tuning."""

from mxrot.watching.board import Board, check_board
from mxrot.watching.json_lines import JsonLines
from mxrot.watching.limit import TimeLimit, seconds_of
from mxrot.watching.watch import Listener, Watch

__all__ = ["Board", "JsonLines", "Listener", "TimeLimit", "Watch", "check_board", "seconds_of"]
