"""The numbers behind a picture, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote


@dataclass(frozen=True)
class Sheet:
    """A table: a cell is a string, an integer, a float, or None for nothing."""

    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()

    def csv(self) -> str:
        """Lines of CSV, the names of the columns first; floats with every digit that they need."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return file.getvalue()

    def link(self) -> str:
        """The same as the address of a link, which holds it whole."""
        return "data:text/csv;charset=utf-8," + quote(self.csv(), safe=",.-+_:;()/|*", errors="replace")
