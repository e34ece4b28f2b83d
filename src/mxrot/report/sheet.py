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
    """A table. A cell is a string, an integer, a float, or None if it is empty."""

    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()

    def csv(self) -> str:
        """Lines of CSV with a header. Floats have all digits that they need."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return file.getvalue()

    def link(self) -> str:
        """The CSV as a data link that holds all of it."""
        return "data:text/csv;charset=utf-8," + quote(self.csv(), safe=",.-+_:;()/|*", errors="replace")
