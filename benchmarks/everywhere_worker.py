"""What a process of benchmarks/everywhere.py does: one task a line of standard input, one answer a line of its output.

The original's hidden states are computed once for a model and its texts, by one task, and lie in a folder; a task that
measures a quantized model has its blocks and the original's head in memory, and makes the logits of both from them for
a thousand positions at once (`mxrot.evaluation.KeptOriginal`).
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mxrot import api, quantizing
from mxrot.calibration import generated_windows
from mxrot.errors import MxrotError
from mxrot.evaluation import KeptOriginal
from mxrot.failures import machine_failure
from mxrot.models import FolderSource
from mxrot.recipe import Recipe
from mxrot.report.trials import let_go
from mxrot.transforms import generator_for

MEASURES = ("kl", "agreement", "nll", "original_nll")
"""Of each window, in the order of `KeptOriginal.means`."""

What = dict[str, Any]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()


def answer(what: What) -> dict[str, Any]:
    """What one task gives, or what went wrong; after an error that is not told by a class of its own, whatever is left
    of the process is not to be trusted."""
    started = time.monotonic()
    try:
        found = {"states": keep_states, "own text": write_text, "recipe": measure}[what["kind"]](what)
        return found | {"all_seconds": time.monotonic() - started}
    except MxrotError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    except Exception as error:
        lacked = machine_failure(error)
        if lacked is not None:
            return {"error": f"{type(lacked).__name__}: {lacked}"}
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}", "ends": True}
    finally:
        let_go()


def keep_states(what: What) -> dict[str, Any]:
    """The original's states on all texts, into a folder."""
    model, _ = api.open_model(what["folder"], what["device"])
    kept = kept_original(what)
    for name, windows in texts(what).items():
        kept.keep(model, name, windows, what["batch"])
    return {}


def write_text(what: What) -> dict[str, Any]:
    """Windows that the original writes itself, from nothing, into a file.

    Their draws are others than those of a recipe with the same seed that has the model write as well.
    """
    model, _ = api.open_model(what["folder"], what["device"])
    generator = generator_for(what["seed"], "windows for benchmarks/everywhere.py")
    written = generated_windows(model, what["samples"], what["seq_len"], generator)
    path = Path(what["own"])
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    save_file({"ids": written.to(torch.int32)}, unfinished)
    unfinished.replace(path)
    return {}


def measure(what: What) -> dict[str, Any]:
    """Quantize with a recipe; every measure of every window of every text."""
    recipe = Recipe.from_toml(what["recipe"], what["label"])
    windows = None if recipe.is_data_free else calibration_windows(what)
    if windows is not None:
        count, length = windows.shape
        recipe = replace(recipe, calibration=replace(recipe.calibration, samples=count, seq_len=length))
    result = quantizing.quantize(
        Path(what["folder"]), recipe, windows=windows, device=what["device"], seed=what["seed"]
    )
    assert result.model is not None
    kept = kept_original(what)
    head = kept.head(what["device"])
    return {
        "seconds": result.record.seconds,
        "peak_gpu_bytes": result.record.peak_gpu_bytes,
        "texts": {
            name: dict(zip(MEASURES, kept.means(result.model, head, name, ids, what["batch"]).tolist(), strict=True))
            for name, ids in texts(what).items()
        },
    }


def calibration_windows(what: What) -> Tensor:
    """int64 [W, T]."""
    if "own" in what:
        return load_file(what["own"])["ids"].long()
    return load_file(what["windows"])[f"calibration {what['calibration']}"].long()


def texts(what: What) -> dict[str, Tensor]:
    """The windows of each evaluation text, int64 [W, T]."""
    found = load_file(what["windows"])
    return {name: found[f"text {name}"].long() for name in what["texts"]}


def kept_original(what: What) -> KeptOriginal:
    return KeptOriginal(FolderSource(Path(what["folder"])), Path(what["states"]))


if __name__ == "__main__":
    main()
