"""examples/ runs: the cells of the notebook in order, and each script as its README says."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_model import write_tiny_model
from transformers.utils import logging as transformers_logging

import mxrot
from mxrot.models import lookup

EXAMPLES = Path(__file__).parents[1] / "examples"
README = (EXAMPLES / "README.md").read_text(encoding="utf-8")
COMMANDS = dict(re.findall(r"^ {4}python examples/(\w+)\.py (.*)$", README, re.MULTILINE))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the examples run, with another demo model."""
    original = write_tiny_model(tmp_path / "original", max_position_embeddings=1024)
    monkeypatch.setattr(lookup, "demo_folder", lambda *_, **__: original)
    monkeypatch.chdir(tmp_path)
    transformers_logging.disable_progress_bar()
    yield tmp_path
    transformers_logging.enable_progress_bar()


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_names_every_file() -> None:
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert set(re.findall(r"\]\((\w+\.\w+)\)", README)) == files
    assert {f"{name}.py" for name in COMMANDS} == {name for name in files if name.endswith(".py")}


def test_the_notebook_runs_and_holds_no_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [cell for cell in json.loads((EXAMPLES / "first_steps.ipynb").read_text())["cells"]]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec(compile("".join(cell["source"]), "first_steps.ipynb", "exec"), names)
    printed = capsys.readouterr().out
    assert "KL 0." in printed and 'name = "hadamard"' in printed and names["model"].num_parameters()


@pytest.mark.parametrize(("name", "says"), [("quantize", "bits a weight"), ("compare", "same top token")])
def test_a_script_runs(
    name: str, says: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, *COMMANDS[name].split()])
    script(name).main()
    printed = capsys.readouterr().out
    assert says in printed
    if name == "compare":
        assert [line.split()[0] for line in printed.splitlines()] == ["recipe", "rtn", "hadamard"]
    else:
        assert "5.8" < re.findall(r": (\d\.\d+) bits", printed)[0] < "6.3", "one block of two in eight bits"


def test_the_server_answers(folder: Path) -> None:
    mxrot.quantize("demo", "hadamard", output="smollm2-hadamard")
    server = script("serve").server_of(COMMANDS["serve"].split()[0], 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def post(table: object) -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{server.server_port}", json.dumps(table).encode())
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)

    try:
        assert isinstance(post({"prompt": "One two", "max_tokens": 3})["text"], str)
        with pytest.raises(urllib.error.HTTPError) as refused:
            post({"text": "no prompt"})
        assert refused.value.code == 400
        refused.value.close()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
