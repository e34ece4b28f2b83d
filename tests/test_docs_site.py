"""docs/ as a site: it builds without a warning, and a reader's browser fetches nothing from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FETCHED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//|url\([\"']?(?:https?:)?//|@import"
)
LINKED = re.compile(r"<link\b[^>]*rel=[\"']?(?:stylesheet|preload|preconnect|icon)[^>]*href=[\"']?(?:https?:)?//")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built in a folder of its own."""
    if importlib.util.find_spec("material") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("needs the extra docs: mkdocs-material and mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} | {"index", "contributing", "changelog"}
    assert pages <= {path.stem for path in site.glob("*.html")}
    assert (site / "tour.py").is_file() and not (site / "site.py").exists()


def test_the_reference_shows_every_public_name(site: Path) -> None:
    import mxrot

    text = (site / "api.html").read_text(encoding="utf-8")
    assert [name for name in mxrot.__all__ if f'id="mxrot.{name}"' not in text] == []


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    files = [path for path in site.rglob("*") if path.suffix in (".html", ".css")]
    assert len(files) > 20
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert FETCHED.search(text) is None and LINKED.search(text) is None, path.name


def test_what_is_fetched_is_found() -> None:
    assert FETCHED.search('<script defer src="https://a.b/c.js">') and FETCHED.search("src: url(//a.b/font.woff2)")
    assert LINKED.search('<link rel="stylesheet" href="https://a.b/c.css">')
    assert not FETCHED.search('<script src="assets/c.js">') and not LINKED.search(
        '<link rel="canonical" href="https://a.b">'
    )
