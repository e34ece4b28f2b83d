"""A report in a browser: nothing is broken, and nothing is wider than the screen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.report.browser import CHROMIUM, Browser, browser

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian's package is chromium)")


_HOVER = r"""
[...document.querySelectorAll("svg[data-marks]")].reduce((found, svg) => {
  const mark = JSON.parse(svg.dataset.marks).at(-1);
  const [x, y] = Array.isArray(mark) ? mark : [mark.box[0] + mark.box[2] / 2, mark.box[1] + mark.box[3] / 2];
  const at = new DOMPoint(x, y).matrixTransform(svg.getScreenCTM());
  svg.dispatchEvent(new PointerEvent("pointermove", { clientX: at.x, clientY: at.y }));
  const tip = document.querySelector(".tip");
  const words = Array.isArray(mark) && !tip.textContent.split("\n").includes(mark[2]) ? "" : tip.textContent;
  found[svg.parentElement.querySelector("a.csv").download] = tip.hidden ? "" : words;
  svg.dispatchEvent(new PointerEvent("pointerleave", {}));
  return found;
}, {})
"""
_HOVER_TOKEN = """
(() => {
  const tip = document.querySelector(".tip"), token = document.querySelector(".token");
  token.dispatchEvent(new PointerEvent("pointermove", { clientX: 5, clientY: 5 }));
  const shown = tip.hidden ? "" : tip.textContent;
  token.dispatchEvent(new PointerEvent("pointerleave", {}));
  return [shown, tip.hidden ? "" : tip.textContent];
})()
"""
_SORT = """
(() => {
  const table = [...document.querySelectorAll("table.sortable")].find((each) => each.textContent.includes("damping"));
  const column = () => [...table.tBodies[0].rows].map((row) => Number(row.cells[2].dataset.value));
  const button = table.tHead.rows[0].cells[2].querySelector("button");
  return [1, 2].map(() => { button.click(); return column(); });
})()
"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser") / "profile") as opened:
        yield opened


@pytest.fixture(scope="module")
def page_file(report_page: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(report_page, encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_fits_a_phone_and_a_desk_and_shows_every_picture(tab: Browser, page_file: Path, width: int, dark: bool) -> None:
    seen = tab.look_at(page_file, width, dark)
    assert seen["width"] == width
    assert seen["content"] <= width and seen["wide"] == []
    assert seen["broken"] == []
    assert seen["pictures"] == 3 * 4 + 2 * 2, "of four sites two maps and a scale of colours, two maps of errors"
    assert (seen["drawings"], seen["flat"]) == (3 + 2 + 1 + 2 * 4 + 2, 0)
    assert seen["page"] == ("rgb(18, 21, 27)" if dark else "rgb(255, 255, 255)")
    assert seen["ink"] == ("rgb(195, 201, 212)" if dark else "rgb(59, 66, 80)")


def test_a_pointer_finds_values_and_a_click_sorts(tab: Browser, page_file: Path) -> None:
    tab.look_at(page_file, 1280)
    said = tab.evaluate(_HOVER)
    assert len(said) == 3 + 2 + 1 + 2 * 4 + 2 and all(said.values()), said
    assert all("times the median" in words for name, words in said.items() if name.startswith("magnitudes-"))
    token, gone = tab.evaluate(_HOVER_TOKEN)
    assert "the original expected" in token and gone == ""
    down, up = tab.evaluate(_SORT)
    assert down == sorted(down, reverse=True) and up == sorted(up) and len(set(up)) > 5


def test_is_light_in_print_wherever_it_is_printed(tab: Browser, page_file: Path) -> None:
    seen = tab.look_at(page_file, 700, dark=True, media="print")
    assert seen["page"] == "rgb(255, 255, 255)" and seen["ink"] == "rgb(59, 66, 80)"
    assert seen["content"] <= 700 and seen["wide"] == []
    columns = "getComputedStyle(document.querySelector('.pairs')).gridTemplateColumns.split(' ').length"
    links = "getComputedStyle(document.querySelector('a.csv')).display"
    assert (tab.evaluate(columns), tab.evaluate(links)) == (2, "none")


def test_would_find_what_is_too_wide_or_broken(tab: Browser, tmp_path: Path, report_page: str) -> None:
    path = tmp_path / "bad.html"
    path.write_text('<!DOCTYPE html><div style="width: 500px">a</div><img src="data:image/png;base64,AAAA">')
    narrow, wide = tab.look_at(path, 360), tab.look_at(path, 1280)
    assert narrow["wide"] == ["DIV."] and wide["wide"] == []
    assert len(narrow["broken"]) == 1
    path.write_text(report_page.replace("iVBOR", "AAAAA", 2))
    assert len(tab.look_at(path, 1280)["broken"]) == 2
