"""The commands and the Python of the README and of docs/, as written; what they call a model is a tiny one."""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub.constants
import pytest
import tomllib
from tests import pages
from tests.pages import PAGES, ROOT, Snippet, commands, snippets
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from mxrot.calibration import generation
from mxrot.cli import app
from mxrot.models import lookup

BY_ANOTHER_TEST = {"docs/text.md": "tests/test_text_guide.py"}
"""Pages with a test of their own, which has the files that they name."""
CHECKPOINT = "smollm2-mxfp4"
"""Other pages begin with what the README has made."""
MINUTES = ("docs/compare.md",)
"""Pages that compare every recipe there is; they run at night."""
FEW = ("--samples", "4", "--seq-len", "64")
QUICK = {
    "quantize": FEW,
    "compare": ("--samples", "2", "--windows", "2", "--seq-len", "64"),
    "search": (*FEW, "--windows", "1"),
    "serve": ("--dry-run",),  # a server goes on until somebody ends it: all but its start
}
"""Options that a command of a page gets where it does not name them itself."""
QUICK_ON_PAGE = {
    ("docs/scale.md", "search"): ("--choices", "mxfp8_e4m3"),
    ("docs/scale.md", "eval"): ("--task-data", "task-data"),
    ("docs/tasks.md", "eval"): ("--task-data", "task-data"),
    ("docs/models.md", "eval"): ("--seq-len", "64"),
    ("docs/vllm.md", "serve"): ("--program", "vllm"),  # their options need it; a dry run does not
}
ORIGINAL_OF_CHECKPOINT = {"docs/tasks.md": "MODEL"}
"""Pages whose tasks need a tokenizer with a token that ends a text."""


class Elsewhere(NamedTuple):
    """Why a command is not run here, and the text in a file that shows where it is."""

    why: str
    file: str
    holds: str


PACKAGES = Elsewhere("installs packages", ".ci/release_check", "-m pip install -qq --disable-pip-version-check")
BENCHMARK = "takes hours, or a GPU; its options are parsed here"
NOT_RUN = {
    "pip install": PACKAGES,
    "make test": Elsewhere("is this test", ".github/workflows/ci.yml", "run: make test"),
    "make lint": Elsewhere("installs packages", ".github/workflows/ci.yml", "run: make lint"),
    "make docs": Elsewhere("installs packages", ".github/workflows/ci.yml", "run: make docs"),
    "make matrix": Elsewhere("takes minutes", "tests/contracts/test_matrix.py", "@pytest.mark.nightly"),
    "make faults": Elsewhere("takes half an hour", ".github/workflows/nightly.yml", "run: make faults"),
    "make release-check": Elsewhere("installs packages", ".github/workflows/release.yml", "run: make release-check"),
    "vllm serve": Elsewhere("needs vLLM", "tests/vllm/test_serving_options.py", "serve"),
    "PYTHONPATH=.venv-vllm": Elsewhere("needs vLLM's files", "tests/vllm/figures.py", "if __name__"),
    "lm_eval --model hf": Elsewhere("data of the hub", "tests/unit/test_autoload.py", '"-m", "lm_eval"'),
    'python -c "import mxrot; from lm_eval': Elsewhere(
        "data of the hub", "tests/unit/evaluation/test_tasks.py", "lm_eval.models.huggingface"
    ),
    "python examples/": Elsewhere("have a test of their own", "tests/test_examples.py", "python examples/"),
    "python docs/tour.py": Elsewhere("needs the demo model", "tests/test_demo_model.py", "tour.py"),
    "if [ $? -eq 75 ]": Elsewhere("needs Slurm", "tests/unit/test_jobs.py", "hands_itself_on"),
    "python benchmarks/long_context.py": Elsewhere(BENCHMARK, "tests/test_benchmarks.py", 'imported("long_context")'),
    "python benchmarks/everywhere.py": Elsewhere(BENCHMARK, "tests/test_everywhere.py", "everywhere.main()"),
    "python benchmarks/accuracy.py": Elsewhere(BENCHMARK, "tests/test_benchmarks.py", "measure_units("),
    "python benchmarks/serving.py": Elsewhere(BENCHMARK, "tests/test_benchmark_of_serving.py", "serving.main("),
    "python benchmarks/serving_random.py": Elsewhere(
        BENCHMARK, "tests/test_benchmark_of_serving.py", 'imported("serving_random")'
    ),
    "python benchmarks/tasks.py": Elsewhere(BENCHMARK, "tests/test_benchmarks.py", "tasks.main()"),
}
"""Commands of other programs, by how they begin."""
BEHIND = {"make demo": ["demo"]}
"""What such a command starts, once packages are installed: that is run."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the hub, and the folder in which commands run, as `folder` copies it."""
    made = tmp_path_factory.mktemp("pages")
    pages.write_hub(made / "hub")
    pages.write_place(made / "place")
    return made


@pytest.fixture
def folder(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the commands run: with models of the names that they use, and two texts; without a network."""
    pages.copied(place / "place", tmp_path)
    monkeypatch.setattr(lookup, "demo_folder", lambda *_, **__: tmp_path / "demo-model")
    monkeypatch.setattr(generation, "SEQUENCE_TOKENS", 16)  # one at a time, 256 of them take most of the test
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(place / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("MXROT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    transformers_logging.disable_progress_bar()
    yield tmp_path
    transformers_logging.enable_progress_bar()


def of_kind(page: str, kind: str) -> list[Snippet]:
    return [snippet for snippet in snippets(page) if snippet.kind == kind]


def test_pages_have_something_to_run() -> None:
    for page in ("README.md", "docs/guide.md"):
        assert len(of_kind(page, "mxrot")) >= 5 and of_kind(page, "python"), page
    assert set(BY_ANOTHER_TEST) <= set(PAGES)
    for page, test in BY_ANOTHER_TEST.items():
        assert Path(page).name in (ROOT / test).read_text(encoding="utf-8")


def test_what_is_not_run_here_says_why_and_where_it_is() -> None:
    """Each command of another program is listed, and each line of the list is needed and true."""
    others = [snippet.text for page in PAGES for snippet in of_kind(page, "command")]
    listed = (*NOT_RUN, *BEHIND)
    assert [text for text in others if not text.startswith(listed)] == []
    assert [start for start in listed if not any(text.startswith(start) for text in others)] == []
    for start, (_, file, holds) in NOT_RUN.items():
        assert holds in (ROOT / file).read_text(encoding="utf-8"), start
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"$(VENV)/bin/mxrot {shlex.join(words)}" in makefile for words in BEHIND.values())
    for page, name in QUICK_ON_PAGE:
        assert name in [snippet.words[0] for snippet in of_kind(page, "mxrot")], (page, name)


def parse(words: list[str]) -> None:
    """What comes after `mxrot`; an error if there is no such command or option, or one is missing."""
    if words[0].startswith("-"):
        return
    command, rest = commands()[words[0]], words[1:]
    if hasattr(command, "commands"):
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_context(words[0], rest).close()


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_has_the_options_that_it_uses(page: str) -> None:
    for snippet in of_kind(page, "mxrot"):
        parse(snippet.words)


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_a_sentence_have_the_options_that_they_use(page: str) -> None:
    """`mxrot plan MODEL --processes N`: all of its options are options of the command."""
    text = pages.FENCED.sub("", pages.shown(page))
    for inline in re.findall(r"`(?:torchrun [^`]* -m )?mxrot ([a-z]+ [^`]*)`", text):
        name, *words = shlex.split(inline)
        command: Any = commands().get(name)
        assert command is not None, f"{page}: mxrot {inline}"
        if hasattr(command, "commands") and words[0] in command.commands:
            command = command.commands[words[0]]
        there = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
        used = {word.split("=")[0] for word in words if word.startswith("-") and word != "--"}
        assert used <= there, f"{page}: mxrot {inline}: no {used - there}"


def benchmark_commands() -> Iterator[Any]:
    for page in PAGES:
        for snippet in of_kind(page, "command"):
            if snippet.text.startswith("python benchmarks/"):
                yield pytest.param(snippet.text, id=f"{page} {snippet.text.split()[1]}")


class ParsedError(Exception):
    """Raised in place of running a program, once it has read its options."""


@pytest.mark.parametrize("command", list(benchmark_commands()))
def test_a_benchmark_has_the_options_that_a_page_uses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the point at which it has read them. `...` stands for those that another command of the page names."""
    real = argparse.ArgumentParser.parse_args

    def parse_args(parser: argparse.ArgumentParser, *given: Any) -> Any:
        raise ParsedError(real(parser, *given))

    _, program, *words = shlex.split(command, comments=True)
    if "..." in words:
        words[words.index("...") : words.index("...") + 1] = ["--original", "X", "--checkpoint", "Y"]
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [program, *words])
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    with pytest.raises(ParsedError):
        runpy.run_path(str(ROOT / program), run_name="__main__")


def test_what_pip_and_make_are_asked_for_is_there() -> None:
    """Extras of the package, versions of constraints.txt, targets of the Makefile."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    vllm = (ROOT / "src" / "mxrot" / "vllm" / "devices.py").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    checked = 0
    for page in PAGES:
        for word in re.findall(r"\bmake ([a-z-]+)`|^ +make ([a-z-]+)", pages.shown(page), re.MULTILINE):
            assert "".join(word) in targets, f"{page}: make {word}"
        for extras in re.findall(r"pip install (?:-e )?'(?:\.|mxrot)\[([a-z,]+)\]'", pages.shown(page)):
            assert set(extras.split(",")) <= set(project["optional-dependencies"]), f"{page}: {extras}"
            checked += 1
        for package, version in re.findall(r"pip install [^\n`]*?([\w-]+)==([\d.]+\d)", pages.shown(page)):
            assert f"{package}=={version}" in pinned or f'"{version}"' in vllm, f"{page}: {package}=={version}"
            checked += 1
    assert checked > 5


def run_pages() -> Iterator[Any]:
    for page in PAGES:
        has_something = of_kind(page, "mxrot") or of_kind(page, "python")
        if page not in BY_ANOTHER_TEST and has_something:
            yield pytest.param(page, marks=[pytest.mark.nightly] if page in MINUTES else [])


def quick_words(page: str, snippet: Snippet) -> list[str]:
    """The words of a command, with the options that make it quick."""
    words = snippet.words
    for quick in (QUICK_ON_PAGE.get((page, words[0]), ()), QUICK.get(words[0], ())):
        names = quick[::2] if len(quick) > 1 else quick
        for place, name in enumerate(names):
            if name not in words:
                end = words.index("--") if "--" in words else len(words)
                words[end:end] = quick[2 * place : 2 * place + 2]
    return words


@pytest.mark.parametrize("page", list(run_pages()))
def test_what_a_page_says_runs(page: str, folder: Path) -> None:
    if page != "README.md":
        model = ORIGINAL_OF_CHECKPOINT.get(page, "demo")
        run(["quantize", model, "-r", "hadamard", "-o", CHECKPOINT], CHECKPOINT)
    for snippet in snippets(page):
        if snippet.kind == "python":
            exec(compile(snippet.text, page, "exec"), {})
        if snippet.text in BEHIND:
            run(BEHIND[snippet.text], snippet.text)
        if snippet.kind == "mxrot":
            words = quick_words(page, snippet)
            run(words, snippet.text)
            if words[0] == "quantize":
                assert (folder / words[words.index("-o") + 1] / "run.json").is_file(), snippet.text


@pytest.mark.nightly
def test_commands_of_several_processes_run_in_several(folder: Path) -> None:
    """Those behind torchrun, as they are written."""
    found = [snippet for snippet in of_kind("docs/scale.md", "mxrot") if snippet.text.startswith("torchrun ")]
    assert {snippet.words[0] for snippet in found} == {"quantize", "eval", "compare", "search"}
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for snippet in found:
        launcher = [sys.executable, "-m", "torch.distributed.run"]
        launcher += shlex.split(snippet.text.partition(" mxrot ")[0])[1:]
        words = [*launcher, "mxrot", *quick_words("docs/scale.md", snippet)]
        ended = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, f"{snippet.text}\n{ended.stdout}\n{ended.stderr}"
    assert json.loads((folder / "OUT" / "run.json").read_text())["fingerprint"]["ranks"] == [2]


def run(arguments: list[str], text: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, f"{text}\n{result.output}\n{result.exception}"
