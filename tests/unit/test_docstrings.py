"""The docstrings of the public functions: they name every parameter and what comes back, and their examples run."""

from __future__ import annotations

import doctest
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.tiny_model import write_tiny_model
from transformers.utils import logging as transformers_logging

import mxrot
from mxrot.models import lookup

FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(mxrot, name) for name in ("quantize", "load", "evaluate", "diverge", "evaluate_tasks")},
    "progress.bar": mxrot.progress.bar,
    "Recipe.load": mxrot.Recipe.load,
    "Recipe.changed": mxrot.Recipe.changed,
}
SHOWN: dict[str, Any] = {
    **FUNCTIONS,
    "Recipe": mxrot.Recipe,
    "MxrotConfig": mxrot.MxrotConfig,
    "QTensor": mxrot.QTensor,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What the examples name: the demo model, an original, a checkpoint of it."""
    original = write_tiny_model(tmp_path / "original", max_position_embeddings=1024)
    monkeypatch.setattr(lookup, "demo_folder", lambda *_, **__: original)
    monkeypatch.chdir(tmp_path)
    transformers_logging.disable_progress_bar()
    yield tmp_path
    transformers_logging.enable_progress_bar()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_is_explained(name: str) -> None:
    text = inspect.getdoc(FUNCTIONS[name]) or ""
    explained = re.search(r"^Args:\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    names = re.findall(r"^    (\w+): \S", explained[1], re.MULTILINE) if explained else []
    assert names == [one for one in inspect.signature(FUNCTIONS[name]).parameters if one != "self"]
    assert "\nReturns:\n" in text


@pytest.mark.parametrize("name", SHOWN)
def test_the_example_runs(name: str, folder: Path) -> None:
    text = inspect.getdoc(SHOWN[name]) or ""
    names = {"mxrot": mxrot, "torch": torch, "transformers": transformers}
    found = doctest.DocTestParser().get_doctest(text[text.index("Example:") :], names, name, None, None)
    assert found.examples
    if name in ("load", "evaluate", "diverge"):
        mxrot.quantize("demo", "hadamard", output="smollm2-hadamard")
    told: list[str] = []
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(found, out=told.append).failed == 0, "".join(told)
