"""examples/ runs: the cells of the notebook in order, and each script as its README says."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tests.cases.odd_tokenizers import TEMPLATE, change_tokenizer
from tests.tiny_model import write_tiny_model
from transformers.utils import logging as transformers_logging

import mxrot
from mxrot.models import lookup

EXAMPLES = Path(__file__).parents[1] / "examples"
README = (EXAMPLES / "README.md").read_text(encoding="utf-8")
popen = subprocess.Popen
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


VLLM = '''
"""Stands for vLLM: answers a chat with what it was started and asked with, once it has been asked for its health."""
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

healthy = []

class Handler(BaseHTTPRequestHandler):
    def reply(self, status, table):
        body = json.dumps(table).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        healthy.append(self.path)
        self.reply(200 if len(healthy) > 1 else 503, {})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        told = json.dumps({"path": self.path, "words": sys.argv[1:3], "healthy": healthy, **asked})
        self.reply(200, {"choices": [{"message": {"content": told}}]})

HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
'''


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in the place of vLLM, where `mxrot serve` finds it."""
    package = tmp_path / "program" / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    for parent in (package, package.parent, package.parent.parent):
        (parent / "__init__.py").touch()
    (package / "main.py").write_text(VLLM)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'program'}{os.pathsep}{EXAMPLES.parent / 'src'}")


@pytest.fixture
def checkpoint(folder: Path) -> str:
    """Made of a model with a chat template, by the command that comes before in the README."""
    change_tokenizer(folder / "original", TEMPLATE)
    found = shlex.split(COMMANDS["serve"])[0]
    assert found == COMMANDS["quantize"].split()[1]
    mxrot.quantize("demo", "hadamard", output=found)
    return found


def test_a_server_is_started_asked_and_ended(
    checkpoint: str, vllm: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By `mxrot serve`, which starts vLLM; asked when it is healthy, and not before."""
    serve, words = script("serve"), shlex.split(COMMANDS["serve"])
    started: list[subprocess.Popen[bytes]] = []
    monkeypatch.setattr(serve.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[0])
    monkeypatch.setattr(sys, "argv", ["serve.py", *words, "--max-tokens", "5"])
    serve.main()
    printed = capfd.readouterr()
    told = json.loads(printed.out)
    assert told["words"] == ["serve", str(Path(checkpoint).resolve())] and told["path"] == "/v1/chat/completions"
    assert told["messages"] == [{"role": "user", "content": words[1]}] and told["max_tokens"] == 5
    assert told["healthy"] == ["/health", "/health"] and "linears by mxrot's plugin" in printed.err
    assert started[0].returncode is not None


@pytest.mark.parametrize(
    ("program", "seconds", "says"),
    [("raise SystemExit(2)", 60, "ended with exit code 2"), ("input()", 0, "not ready within 0 s")],
)
def test_a_server_that_does_not_come_ends_the_example(program: str, seconds: float, says: str) -> None:
    serve = script("serve")
    with popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        with pytest.raises(SystemExit, match=says):
            serve.wait_until_healthy(process, f"http://127.0.0.1:{serve.free_port()}", seconds)
        process.terminate()


@pytest.mark.nightly
@pytest.mark.skipif(find_spec("uvicorn") is None, reason="needs pip install 'transformers[serving]'")
def test_the_server_of_transformers_answers(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["serve.py", *shlex.split(COMMANDS["serve"]), "--max-tokens", "5"])
    script("serve").main()
    printed = capfd.readouterr()
    assert printed.out.strip() and 'POST /v1/chat/completions HTTP/1.1" 200' in printed.err
