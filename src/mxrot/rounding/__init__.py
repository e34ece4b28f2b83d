"""Rounding methods. Each is one class, listed here."""

from mxrot.errors import ConfigError
from mxrot.nearest import not_known
from mxrot.rounding.base import Prepared, Requirements, Rounded, RoundingMethod
from mxrot.rounding.gptq import GPTQ
from mxrot.rounding.rtn import RoundToNearest

METHODS: dict[str, type[RoundingMethod]] = {method.name: method for method in (RoundToNearest, GPTQ)}


def get_rounding(name: str) -> type[RoundingMethod]:
    """The method called `name`. ConfigError, with a list of all methods, if there is none."""
    if name not in METHODS:
        raise ConfigError(not_known("rounding", name, METHODS))
    return METHODS[name]


__all__ = ["METHODS", "Prepared", "Requirements", "Rounded", "RoundingMethod", "get_rounding"]
