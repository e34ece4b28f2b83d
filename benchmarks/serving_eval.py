"""Losses of mxrot's own evaluation on the windows of a task of benchmarks/serving.py, which starts this.

The same functions as `mxrot eval`, which gives no single windows, and so no error of a difference.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from serving_worker import said, write_result

from mxrot import api
from mxrot.evaluation.perplexity import nll_of_states, states_of


@torch.no_grad()
def window_means(folder: Path, windows: list[list[int]]) -> list[float]:
    """Mean negative log-likelihood of each window, by the model in `folder`."""
    device = api.default_device()
    model, _ = api.open_model(folder, device)
    found = []
    for window in windows:
        ids = torch.tensor([window], device=device)
        found.append(float(nll_of_states(model, states_of(model, ids), ids)))
    return found


def main() -> int:
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found: dict[str, Any]
    try:
        found = {"eval_nlls": window_means(Path(task["options"]["model"]), task["windows"]), "is_done": True}
    except Exception as error:
        traceback.print_exc()
        found = {"error": said(error)}
    write_result(task["result"], found)
    return 0 if "error" not in found else 1


if __name__ == "__main__":
    sys.exit(main())
