"""Every link of the pages leads somewhere: to a file that is there, and to a heading that the page has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
LINK = re.compile(r"\]\(([^()\s]+)\)|<img[^>]* src=\"([^\"]+)\"")
ELSEWHERE = re.compile(r"[a-z]+:")


def prose(page: Path) -> str:
    """A page without its boxes of code, in which `#` begins no heading and brackets are no link."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", lambda code: code[0] if "](" not in code[0] else "", text)


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links: small letters, no punctuation, a hyphen for a space."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} +(.+?)\s*$", prose(page), flags=re.MULTILINE):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found[name] = found.get(name, -1) + 1
    return {name if not number else f"{name}-{number}" for name, count in found.items() for number in range(count + 1)}


def dead(page: Path, root: Path = ROOT) -> list[str]:
    """The links of a page that lead nowhere in the repository."""
    lost = []
    for written in (one or other for one, other in LINK.findall(prose(page))):
        if ELSEWHERE.match(written):
            continue
        path, _, anchor = written.partition("#")
        place = (page.parent / path).resolve() if path else page
        is_inside = place.is_relative_to(root) and place.exists()
        if not is_inside or (anchor and (place.suffix != ".md" or anchor not in anchors(place))):
            lost.append(written)
    return lost


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert dead(page) == []


def test_dead_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    links = "[a](#one) [b](#one-1) [c](#not-one) [d](none.md) [e](page.md#two) [f](https://a.b) [g](../page.md)"
    page.write_text(f"# One\n\n## One\n\n```\n# not one\n```\n{links}\n")
    assert anchors(page) == {"one", "one-1"}
    assert dead(page, tmp_path) == ["#not-one", "none.md", "page.md#two", "../page.md"]
