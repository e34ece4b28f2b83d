"""The command line in this process, and logits: what the cases are told by.

Cases go through what a user can call (`mxrot ...`, `import mxrot`, transformers), so that they run on any commit.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typer.testing import CliRunner, Result

IDS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(1))
"""Token ids [2, 16] that every model of `tests.tiny_model` takes."""


def mxrot(*words: str | Path, **environment: Any) -> Result:
    """Run `mxrot WORDS`; its `exit_code`, `stdout`, `stderr` and, if it ended in a traceback, its `exception`."""
    from mxrot.cli import app

    with tempfile.TemporaryDirectory() as cache:
        if words[0] == "compare":
            environment.setdefault("MXROT_CACHE", cache)  # where finished runs are kept
        return CliRunner().invoke(app, [str(word) for word in words], env=environment or None)


def refused(*words: str | Path, exit_code: int = 2) -> str:
    """The one line of a command that ends with that exit code and without a traceback."""
    result = mxrot(*words)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == exit_code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("mxrot: error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0].removeprefix("mxrot: error: ")


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    """Logits [S, T, V] in float32 on the CPU."""
    found: Tensor = model(ids.to(model.device)).logits
    return found.float().cpu()
