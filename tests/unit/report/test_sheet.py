"""The numbers behind a picture come back from CSV and from a link as they were."""

from __future__ import annotations

import csv
import io
from urllib.parse import unquote

from mxrot.report.sheet import Sheet

SHEET = Sheet(["name", "value"], [["a, \"b\" <c> & 'd' é\n%0A#", 0.1 + 0.2], ["none", None], ["\ud800", 1e-300]])


def test_csv_keeps_every_digit_and_every_word() -> None:
    read = list(csv.reader(io.StringIO(SHEET.csv())))
    assert [line[0] for line in read[1:]] == [row[0] for row in SHEET.rows]
    assert float(read[1][1]) == 0.1 + 0.2 and read[2][1] == "" and float(read[3][1]) == 1e-300


def test_a_link_holds_the_same_and_needs_no_escaping() -> None:
    kind, _, quoted = SHEET.link().partition(",")
    assert kind == "data:text/csv;charset=utf-8"
    assert not set(quoted) & set("\"'<>& #\n")
    assert unquote(quoted) == SHEET.csv().replace("\ud800", "?")
