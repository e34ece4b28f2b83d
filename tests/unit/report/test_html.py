"""The page of a report: whole, by itself, and harmless."""

from __future__ import annotations

import base64
import copy
import csv
import hashlib
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from tests.unit.report.conftest import UNKIND

from mxrot.recipe import load_recipe
from mxrot.report import Contents, page, pictures, write_files
from mxrot.report.drawing import LIGHT, Picture, inline_svg, render
from mxrot.report.elements import _SCRIPT as SCRIPT

pytest.importorskip("matplotlib")
_VOID = {"meta", "br", "img"}


class Reader(HTMLParser):
    """Text, elements and attributes of a page, and whether elements are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags, self.attributes = "", [], []  # type: ignore[var-annotated]
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_shows_every_part_with_the_numbers_of_the_run(report_page: str, report_contents: Contents) -> None:
    read = Reader(report_page)
    assert read.open == []
    for heading in ("Accuracy", "Error through depth", "Activations", "Weights", "Size and memory", "How it was made"):
        assert heading in read.text
    run = report_contents.run
    for block in run["blocks"]:
        for linear in block["linears"]:
            assert linear["name"] in read.text and f"{linear['output_error']:.4f}" in read.text
    for metric in report_contents.metrics:
        shown = f"{100 * metric.value:.2f}" if metric.is_share else f"{metric.value:.{metric.digits}f}"
        assert shown in read.text
    perplexity = report_contents.metrics[0]
    assert perplexity.original is not None
    assert f"{perplexity.value - perplexity.original:+.3f}" in read.text
    assert f"{run['size']['total_bytes'] / 1e6:,.2f}" in read.text
    assert run["data"]["sha256"] in read.text and run["files"]["config.json"]["sha256"] in read.text
    assert run["versions"]["torch"] in read.text
    assert report_contents.recipe.to_toml() in read.text


def test_loads_nothing_and_runs_its_own_script_alone(report_page: str) -> None:
    read = Reader(report_page)
    assert not {"link", "iframe", "object", "base"} & set(read.tags) and read.tags.count("script") == 1
    script = SCRIPT.read_text()
    assert f"<script>{script}</script>" in report_page
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(value for name, value in read.attributes if name == "content" and "default-src" in (value or ""))
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    sources = [value or "" for name, value in read.attributes if name in ("src", "xlink:href", "data")]
    assert sources and all(value.startswith(("data:image/png;base64,", "#")) for value in sources)
    links = [value or "" for name, value in read.attributes if name == "href"]
    assert all(
        value.startswith(("data:text/csv;", "#")) or value.endswith((".md", ".json", ".toml")) for value in links
    )
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    assert not re.findall(r"url\((?!#)|@import", report_page)
    assert len(report_page.encode()) < 5_000_000


def test_ids_are_of_one_element_each_and_references_lead_somewhere(report_page: str) -> None:
    read = Reader(report_page)
    ids = [value for name, value in read.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', report_page))
    assert used and used <= set(ids)
    assert {"accuracy", "worst-passage", "error-through-depth", "outliers", "how-it-was-made"} <= used, "contents"


def test_what_comes_from_outside_is_escaped(report_page: str, report_contents: Contents) -> None:
    assert UNKIND in Reader(report_page).text
    assert report_page.count("<script") == 1
    run: dict[str, Any] = {**report_contents.run, "model": UNKIND, "device": UNKIND}
    run["files"] = {UNKIND: {"bytes": 1, "sha256": UNKIND}}
    unkind = replace(report_contents, run=run, looked_at=UNKIND, measured=UNKIND, commands=[(UNKIND, UNKIND)])
    written = page(unkind, pictures(unkind))
    assert written.count("<script") == 1
    assert Reader(written).text.count(UNKIND) >= 7


def test_without_quantized_inputs_there_is_no_rounding_of_inputs(report_contents: Contents) -> None:
    views = [
        {name: replace(view, rounding_error=None) for name, view in views.items()}
        for views in (report_contents.before, report_contents.after)
    ]
    plain = replace(report_contents, before=views[0], after=views[1], recipe=load_recipe("rtn"))
    assert "input_error" not in pictures(plain)
    written = page(plain, pictures(plain))
    assert "rounding error" not in written and "This recipe changes no input" in written


def test_a_picture_is_the_same_each_time_and_has_only_variables_for_colours(report_contents: Contents) -> None:
    for name, picture in pictures(report_contents).items():
        svg = inline_svg(name, picture)
        assert svg == inline_svg(name, picture)
        assert "var(--ink)" in svg and "#0102" not in svg
        left = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]+)", svg))
        assert left <= {"#ffffff"}, f"{name} has colours of its own: {left}"


def test_pictures_as_files(report_contents: Contents, tmp_path: Path) -> None:
    drawn = pictures(report_contents)
    write_files(tmp_path / "plots", drawn)
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {f"{name}.{kind}" for name in drawn for kind in ("svg", "png", "csv")}
    for name in drawn:
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "#3b4250" in (tmp_path / "plots" / f"{name}.svg").read_text()
        assert (tmp_path / "plots" / f"{name}.csv").read_text() == drawn[name].sheet.csv()


def test_every_picture_has_a_sheet_on_the_page_and_ticks(report_contents: Contents, report_page: str) -> None:
    drawn = pictures(replace(report_contents, has_surfaces=True))
    assert {"weight_error-map", "output_error-map", "passage", "weights", "exponents"} <= set(drawn)
    links = dict(
        re.findall(r'<a class="csv" download="([^"]+)" href="data:text/csv;charset=utf-8,([^"]+)"', report_page)
    )
    for name, picture in drawn.items():
        table = list(csv.reader(io.StringIO(picture.sheet.csv())))
        assert len(table) > 1 and {len(line) for line in table} == {len(picture.sheet.columns)}
        if not name.startswith("surface"):
            assert unquote(links[f"{name}.csv"]) == picture.sheet.csv()
        svg = inline_svg(name, picture)
        if not name.startswith("surface"):  # its axes are lines of their own
            for axis in ("x", "y"):
                ticks = re.findall(rf'<g id="{axis}tick_', with_ids(name, picture))
                assert len(ticks) >= 2, f"{name} has no ticks on its {axis} axis"
        assert 'data-marks="[]"' not in svg or name.startswith("surface")
    assert len(links) == len([name for name in drawn if not name.startswith("surface")])


def with_ids(name: str, picture: Picture) -> str:
    """The picture as a file, whose groups still have their names."""
    return render(name, picture, LIGHT, "svg").decode()


def test_the_worst_passage_has_both_texts_and_what_each_expected(report_page: str, report_contents: Contents) -> None:
    passage = report_contents.passage
    assert passage is not None and len(passage.rows) == 31 and passage.rows[0][0] == 1
    read = Reader(report_page)
    for said in (passage.original, passage.quantized, passage.where):
        assert said.split("\r")[0] in read.text
    spoken = [value for name, value in read.attributes if name == "data-said"]
    assert spoken == [said.replace("\r", "\n") for said in passage.said] and "the original expected" in spoken[0]
    alone = page(replace(report_contents, passage=None), pictures(replace(report_contents, passage=None)))
    assert "Worst passage" not in alone and 'href="#worst-passage"' not in alone


def test_what_is_far_off_is_marked(report_contents: Contents) -> None:
    run = copy.deepcopy(report_contents.run)
    run["blocks"][1]["linears"][0]["weight_error"] *= 10
    marked = page(replace(report_contents, run=run), pictures(report_contents))
    value = run["blocks"][1]["linears"][0]["weight_error"]
    assert f'<td class="far" data-value="{value!r}">{value:.4f}</td>' in marked
    assert "of 28 errors 1 is" in marked


def test_outliers_are_named(report_page: str, report_contents: Contents) -> None:
    text = Reader(report_page).text
    for name in report_contents.chosen:
        view = report_contents.before[name]
        largest = view.channel_maxima.topk(5).indices.tolist()
        assert ", ".join(map(str, largest)) in text
        assert view.token_maxima.shape == (96,) and float(view.token_maxima.max()) == view.largest


def test_inputs_of_a_rotated_model_are_said_to_be_changed(report_contents: Contents) -> None:
    rotated = load_recipe("rtn").changed({"rotation.residual": "hadamard"})
    found = replace(report_contents, recipe=rotated, before_is_original=False)
    written = page(found, pictures(found))
    assert "without the transform but with the rotations that are in its weights" in written
    assert "This recipe changes no input" not in written
