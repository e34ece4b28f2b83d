"""Write a checkpoint again for another program to run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mxrot.checkpoint.files import sha256_of, write_bytes, write_json
from mxrot.checkpoint.output import check_output, put_in_place
from mxrot.checkpoint.reader import check_files
from mxrot.checkpoint.serving import DEVICES, VERSION, VllmReport, check_for_vllm
from mxrot.errors import CheckpointError

_DTYPE = "bfloat16"
_HEADING = "\n## vLLM\n"


def export_for_vllm(folder: Path, output: Path, force: bool = False) -> VllmReport:
    """Copy the checkpoint in `folder` to the new folder `output` as stock vLLM runs it; what vLLM does with that.

    Weights stay as they are. config.json gives bfloat16, in which vLLM applies the very matrices that weights were
    folded against; the card tells how to serve it. CheckpointError, before anything is written, if stock vLLM would
    not run it, if a file has changed since it was written, or if `output` is not empty, unless `force`.
    """
    report = check_for_vllm(folder)
    if report.stock.stops:
        raise CheckpointError(f"{folder}: vLLM {VERSION} does not run it: {report.stock.stops[0]}")
    check_output(output, force)
    if folder.resolve().is_relative_to(output.resolve()):
        raise CheckpointError(f"{output}: holds the checkpoint that is to be exported; give another folder")
    check_files(folder, verify=True)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write(folder, partial)
        put_in_place(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return check_for_vllm(output)


def _write(folder: Path, output: Path) -> None:
    run = json.loads((folder / "run.json").read_text())
    for name in run["files"]:
        plain = Path(name).name  # as `check_files` looks at it, and never out of the folder
        shutil.copyfile(folder / plain, output / plain)
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    write_json(output / "config.json", config | {"dtype": _DTYPE})
    card = (folder / "README.md").read_text(encoding="utf-8").split(_HEADING)[0]
    write_bytes(output / "README.md", (card + vllm_section(check_for_vllm(output))).encode())
    for name in ("config.json", "README.md"):
        path = output / name
        run["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    exported: dict[str, Any] = {"to": "vllm", "version": VERSION}
    write_json(output / "run.json", run | {"export": exported})


def vllm_section(report: VllmReport) -> str:
    """How to serve it, for the model card."""
    rows = "".join(f"| {device.device} | {device.computes} | {device.note} |\n" for device in DEVICES)
    notes = "".join(f"- {note[0].upper()}{note[1:]}.\n" for note in report.notes)
    sizes = ", ".join(map(str, report.stock.tensor_parallel))
    return (
        f"{_HEADING}\n```\nvllm serve path/to/this/folder --tensor-parallel-size {report.stock.tensor_parallel[0]}\n"
        f"```\n\nvLLM {VERSION} as it comes; tensor parallel {sizes}. Where mxrot is installed beside it, vLLM runs\n"
        "this folder through mxrot, unless `--quantization compressed-tensors` is given.\n\n"
        f"| device | computes | |\n|---|---|---|\n{rows}\n{notes}"
    )
