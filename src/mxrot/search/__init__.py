"""The search for sites that are worth more bits: it raises sites, measures KL, and builds a mixture under a budget."""

from mxrot.search.choices import Choice, parse_choices
from mxrot.search.run import Found, search

__all__ = ["Choice", "Found", "parse_choices", "search"]
