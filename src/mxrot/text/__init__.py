"""Texts, and the token windows of them: what calibration and evaluation read."""

from mxrot.text.sources import Role, Text, load_text, token_windows

__all__ = ["Role", "Text", "load_text", "token_windows"]
