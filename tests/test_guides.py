"""The commands and the Python of the README and of docs/, as written; what they call a model is a tiny one."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from tests.tiny_model import write_tiny_model
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from mxrot.calibration import generation
from mxrot.cli import app
from mxrot.models import lookup

ROOT = Path(__file__).parent.parent
PAGES = [path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
NOT_RUN = {
    "docs/text.md": "tests/test_text_guide.py runs it, with the files that it names",
    "docs/gemma.md": "tests/unit/models/test_families.py quantizes models of these families",
    "docs/add-a-family.md": "a hub; tests/unit/deriving derives families, and a test there runs the Python of the page",
    "docs/models.md": "a hub; tests/cases/test_models_hub.py has one, and quantizes and evaluates at a revision",
    "docs/scale.md": "tests/unit/test_ranks.py starts several processes, tests/unit/watching a run with a time limit",
    "docs/tasks.md": "data of the hub; tests/unit/test_cli.py runs eval --tasks with a folder of data",
}
"""Pages whose commands are only parsed here, and where they are run instead."""
MODELS = ("demo-model", "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B", "some/folder")
CHECKPOINT = "smollm2-mxfp4"
"""Other pages begin with what the README has made."""
QUICK = {"compare": ("--samples", "2", "--windows", "2", "--seq-len", "64")}
"""Options that a command of a page gets where it does not name them itself."""
MINUTES = ("docs/compare.md",)
"""Pages that compare every recipe there is; they run at night."""
UNTIL_ENDED = ("serve",)
"""Commands that go on until somebody ends them: they are parsed, not run."""
COMMAND = re.compile(r"^ {4}(?:torchrun [^\n]* -m )?(mxrot (?:[^\n]*\\\n)*[^\n]*)$", re.MULTILINE)
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


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


def commands_there_are() -> dict[str, typer.core.TyperCommand]:
    group = typer.main.get_command(app)
    return group.commands  # type: ignore[attr-defined]


def shown(page: str) -> str:
    """What a reader sees of a page. A comment that holds a command waits for that command to come."""
    text = (ROOT / page).read_text(encoding="utf-8")
    waiting = re.findall(r"<!-- ([a-z]+)\n(?: {4}mxrot[^\n]*\n)+-->\n", text)
    assert not set(waiting) & set(commands_there_are()), f"{page}: a command that exists is commented out"
    return re.sub(r"<!-- [a-z]+\n(?: {4}mxrot[^\n]*\n)+-->\n", "", text)


def snippets(page: str) -> list[tuple[str, str]]:
    """("mxrot", command line) and ("python", code) in the order of the page."""
    text = shown(page)
    found = [(match.start(), "mxrot", match[1].replace("\\\n", " ")) for match in COMMAND.finditer(text)]
    found += [(match.start(), "python", match[1]) for match in PYTHON.finditer(text)]
    return [(kind, snippet) for _, kind, snippet in sorted(found)]


def words_of(command: str) -> list[str]:
    """What follows `mxrot`."""
    return shlex.split(command, comments=True)[1:]


def test_pages_have_something_to_run() -> None:
    for page in ("README.md", "docs/guide.md"):
        kinds = [kind for kind, _ in snippets(page)]
        assert kinds.count("mxrot") >= 5 and "python" in kinds, page
    assert set(NOT_RUN) <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_has_the_options_that_it_uses(page: str) -> None:
    there = commands_there_are()
    for kind, text in snippets(page):
        words = words_of(text) if kind == "mxrot" else []
        if not words or words[0].startswith("-"):
            continue
        command, rest = there[words[0]], words[1:]
        if hasattr(command, "commands"):
            command, rest = command.commands[rest[0]], rest[1:]
        command.make_context(words[0], rest).close()


def run_pages() -> Iterator[Any]:
    for page in PAGES:
        if page not in NOT_RUN and snippets(page):
            yield pytest.param(page, marks=[pytest.mark.nightly] if page in MINUTES else [])


@pytest.mark.parametrize("page", list(run_pages()))
def test_what_a_page_says_runs(page: str, folder: Path) -> None:
    if page != "README.md":
        run(["quantize", "demo", "-r", "hadamard", "-o", CHECKPOINT], CHECKPOINT)
    for kind, text in snippets(page):
        if kind == "python":
            exec(compile(text, page, "exec"), {})
            continue
        arguments = words_of(text)
        if arguments[0] in UNTIL_ENDED:
            continue
        quick = QUICK.get(arguments[0], ())
        for option, value in zip(quick[::2], quick[1::2], strict=True):
            arguments += [] if option in arguments else [option, value]
        run(arguments, text)
        if arguments[0] == "quantize":
            assert (folder / arguments[arguments.index("-o") + 1] / "run.json").is_file(), text


def run(arguments: list[str], text: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, f"{text}\n{result.output}\n{result.exception}"
