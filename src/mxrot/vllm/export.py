"""Write a checkpoint again so that another program can run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mxrot.checkpoint.checked import Checked, check_checkpoint
from mxrot.checkpoint.config import compressed_tensors_config
from mxrot.checkpoint.files import file_in, seen, write_bytes, write_json
from mxrot.checkpoint.output import Place, check_empty, claimed
from mxrot.checkpoint.partial import check_ours, holds_work, is_note, open_partial, read_fingerprint, remove_partial
from mxrot.checkpoint.placing import finish_placing, put_in_place
from mxrot.checkpoint.side_files import copy_file
from mxrot.documents import read_json, read_text
from mxrot.errors import CheckpointError
from mxrot.marker import MARKER
from mxrot.models import WeightFiles
from mxrot.vllm.devices import DEVICES, VERSION
from mxrot.vllm.verdict import VllmReport, check_for_vllm

_DTYPE = "bfloat16"
_HEADING = "\n## vLLM\n"


def export_for_vllm(folder: Path, output: Path, force: bool = False) -> VllmReport:
    """Copy the checkpoint in `folder` to the new folder `output`, in the form that stock vLLM runs. Returns what vLLM
    does with it.

    Weights stay as they are. config.json says in the words of compressed-tensors what is installed. It sets bfloat16,
    in which vLLM applies exactly the matrices that the weights were folded with. The card tells how to serve the copy.
    CheckpointError, before anything is written, if stock vLLM would not run the copy, if a file has changed since it
    was written, or if `output` is not empty and `force` is not set.
    """
    report = check_for_vllm(folder)
    if report.stock.stops:
        raise CheckpointError(f"{folder}: vLLM {VERSION} does not run it: {report.stock.stops[0]}")
    with claimed(output) as place:
        finish_placing(place, is_note)
        check_empty(place, force)
        _check_partial(place)
        for mine in (place.output, place.partial):
            if folder.resolve().is_relative_to(mine):
                raise CheckpointError(f"{output}: holds the checkpoint that is to be exported; give another folder")
        checked = check_checkpoint(folder, verify=True)
        try:
            open_partial(place.partial, {"export": str(folder.resolve())}, {}, resume=False)
            _write(checked, place.partial)
            put_in_place(place, is_note)
        except BaseException:
            if "export" in (read_fingerprint(place.partial) or {}):
                remove_partial(place.partial)
            raise
    return check_for_vllm(output)


def _check_partial(place: Place) -> None:
    """CheckpointError if the working folder holds work of `mxrot quantize`."""
    check_ours(place.partial)
    if work := holds_work(place.partial):
        raise CheckpointError(f"{place.partial}: holds {work} of `mxrot quantize`; finish that, or give another output")


def _write(checked: Checked, output: Path) -> None:
    folder = checked.folder
    run = read_json(folder / "run.json")
    for name in ("run.json", *run["files"]):
        path = file_in(folder, name)
        copy_file(path, output / path.relative_to(folder))
    config = read_json(folder / "config.json")
    config.pop("torch_dtype", None)
    write_json(output / "config.json", config | {"dtype": _DTYPE, "quantization_config": _quantization(checked)})
    card = read_text(folder / "README.md").split(_HEADING)[0]
    write_bytes(output / "README.md", (card + vllm_section(check_for_vllm(output, verify=False))).encode())
    for name in ("config.json", "README.md"):
        run["files"][name] = vars(seen(output / name))
    exported: dict[str, Any] = {"to": "vllm", "version": VERSION}
    write_json(output / "run.json", run | {"export": exported})


def _quantization(checked: Checked) -> dict[str, Any]:
    """The `quantization_config` by which stock vLLM runs the checkpoint. Keys of other programs in the marker are
    kept."""
    family = checked.family
    dtype = checked.layout.dtype or WeightFiles(checked.folder, family.beside).dtype_of(f"{family.embedding}.weight")
    table = compressed_tensors_config(checked.scheme, family, dtype)
    return table | {MARKER: checked.quantization[MARKER] | table[MARKER]}


def vllm_section(report: VllmReport) -> str:
    """The section of the model card that tells how to serve the copy."""
    rows = "".join(f"| {device.device} | {device.computes} | {device.note} |\n" for device in DEVICES)
    notes = "".join(f"- {note[0].upper()}{note[1:]}.\n" for note in report.notes)
    sizes = ", ".join(map(str, report.stock.tensor_parallel))
    return (
        f"{_HEADING}\n```\nvllm serve path/to/this/folder --tensor-parallel-size {report.stock.tensor_parallel[0]}\n"
        f"```\n\nStock vLLM {VERSION}; tensor parallel {sizes}. Where mxrot is installed beside it, vLLM runs\n"
        "this folder through mxrot, unless `--quantization compressed-tensors` is given.\n\n"
        f"| device | computes | |\n|---|---|---|\n{rows}\n{notes}"
    )
