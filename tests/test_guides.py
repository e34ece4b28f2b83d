"""The commands and the Python of the README and the guide, as written; what they call a model is a tiny one."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.tiny_model import write_tiny_model
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from mxrot.calibration import generation
from mxrot.cli import app
from mxrot.models import lookup

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/guide.md")
MODELS = ("demo-model", "meta-llama/Llama-3.1-8B-Instruct")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the commands run: with models of the names that they use, and two texts."""
    for name in MODELS:
        write_tiny_model(tmp_path / name, max_position_embeddings=4096, head_dim=32)
    for name, step in (("my-text.txt", 1), ("other-text.txt", 7)):
        lines = (f"the number {number} follows {number - step}; " for number in range(0, 250 * step, step))
        (tmp_path / name).write_text("".join(lines))
    monkeypatch.setattr(lookup, "demo_folder", lambda *_, **__: tmp_path / "demo-model")
    monkeypatch.setattr(generation, "SEQUENCE_TOKENS", 16)  # one at a time, 256 of them take most of the test
    monkeypatch.setenv("MXROT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    transformers_logging.disable_progress_bar()
    yield tmp_path
    transformers_logging.enable_progress_bar()


def snippets(page: str) -> list[tuple[str, str]]:
    """("mxrot", command line) and ("python", code) in the order of the page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```|^ {4}(mxrot [^\n]*)$", text, flags=re.MULTILINE | re.DOTALL)
    return [("python", match[1]) if match[1] else ("mxrot", match[2]) for match in found]


def test_pages_have_something_to_run() -> None:
    for page in PAGES:
        kinds = [kind for kind, _ in snippets(page)]
        assert kinds.count("mxrot") >= 5 and "python" in kinds, page


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_says_runs(page: str, folder: Path) -> None:
    for kind, text in snippets(page):
        if kind == "python":
            exec(compile(text, page, "exec"), {})
            continue
        arguments = shlex.split(text, comments=True)[1:]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{text}\n{result.output}\n{result.exception}"
        if "-o" in arguments:
            assert (folder / arguments[arguments.index("-o") + 1] / "run.json").is_file(), text
