"""Which sites of a model are worth more bits: raised, measured by KL, and put into one mixture under a budget."""

from mxrot.search.choices import Choice, parse_choices
from mxrot.search.run import Found, search

__all__ = ["Choice", "Found", "parse_choices", "search"]
