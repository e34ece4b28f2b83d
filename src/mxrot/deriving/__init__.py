"""A family derived from the model itself, for architectures without a written record."""

from mxrot.deriving.asked import AUTO, asked_family, check_asked, record_file
from mxrot.deriving.derive import derived_family
from mxrot.deriving.written import record_text

__all__ = ["AUTO", "asked_family", "check_asked", "derived_family", "record_file", "record_text"]
