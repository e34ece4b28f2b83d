"""A report in a browser: nothing is broken, and nothing is wider than the screen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.report.browser import CHROMIUM, Browser, browser

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian's package is chromium)")


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
    assert seen["pictures"] == 3 * 4, "two maps and a scale of colours for each of four sites"
    assert (seen["drawings"], seen["flat"]) == (3 + 2 * 4 + 1, 0)
    assert seen["page"] == ("rgb(18, 21, 27)" if dark else "rgb(255, 255, 255)")
    assert seen["ink"] == ("rgb(195, 201, 212)" if dark else "rgb(59, 66, 80)")


def test_is_light_in_print_wherever_it_is_printed(tab: Browser, page_file: Path) -> None:
    seen = tab.look_at(page_file, 700, dark=True, media="print")
    assert seen["page"] == "rgb(255, 255, 255)" and seen["ink"] == "rgb(59, 66, 80)"
    assert seen["content"] <= 700 and seen["wide"] == []


def test_would_find_what_is_too_wide_or_broken(tab: Browser, tmp_path: Path, report_page: str) -> None:
    path = tmp_path / "bad.html"
    path.write_text('<!DOCTYPE html><div style="width: 500px">a</div><img src="data:image/png;base64,AAAA">')
    narrow, wide = tab.look_at(path, 360), tab.look_at(path, 1280)
    assert narrow["wide"] == ["DIV."] and wide["wide"] == []
    assert len(narrow["broken"]) == 1
    path.write_text(report_page.replace("iVBOR", "AAAAA", 2))
    assert len(tab.look_at(path, 1280)["broken"]) == 2
