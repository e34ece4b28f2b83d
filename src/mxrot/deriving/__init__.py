"""A family from the model itself, for an architecture that nobody has written a record for."""

from mxrot.deriving.asked import AUTO, asked_family, check_asked, record_file
from mxrot.deriving.derive import derived_family
from mxrot.deriving.written import record_text

__all__ = ["AUTO", "asked_family", "check_asked", "derived_family", "record_file", "record_text"]
