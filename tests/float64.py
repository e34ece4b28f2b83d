"""Models of transformers in float64 all the way, as families are derived with."""

from mxrot.deriving.float64 import InFloat64

__all__ = ["InFloat64"]
