"""Texts and their token windows: the input of calibration and evaluation."""

from mxrot.text.decoding import lone_surrogate
from mxrot.text.document import Chat, Origin, Own, Text, TokenIds, TokenWindows
from mxrot.text.load import is_fetched, load_text
from mxrot.text.mixture import mixed_windows, split_by_weight
from mxrot.text.objects import load_texts
from mxrot.text.roles import Role
from mxrot.text.tokens import Reader, check_ids, token_ids
from mxrot.text.turns import Turns, turns_of
from mxrot.text.windows import Windows, read_windows, token_windows

__all__ = [
    "Chat",
    "Origin",
    "Own",
    "Reader",
    "Role",
    "Text",
    "TokenIds",
    "TokenWindows",
    "Turns",
    "Windows",
    "check_ids",
    "is_fetched",
    "load_text",
    "load_texts",
    "lone_surrogate",
    "mixed_windows",
    "read_windows",
    "split_by_weight",
    "token_ids",
    "token_windows",
    "turns_of",
]
