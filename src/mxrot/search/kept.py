"""The folder of a search: the quantized model, every site rounded in each way, and the measurements.

A folder belongs to one model, recipe, calibration text, seed, device and set of choices, and its name is their hash.
The budget is not part of it, so a search with another budget continues from the same folder. A block is finished when
its note exists (checkpoint/partial.py). The other roundings of its sites are written before that. With several
processes, the first one writes the model and the measurements, and each one writes the sites that it has rounded. All
processes must see the folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from mxrot.calibration import ONE, World
from mxrot.checkpoint.files import write_tensors
from mxrot.checkpoint.partial import PartialCheckpoint
from mxrot.models import Family
from mxrot.search.bits import Cell
from mxrot.search.choices import Choice


class KeptSearch:
    """The files of one search."""

    def __init__(self, folder: Path, key: Mapping[str, Any], resume: bool, world: World = ONE) -> None:
        """Open the search that `key` describes, in `folder`. Without `resume` it starts anew. The processes of `world`
        work from it together."""
        self.world = world
        text = json.dumps(key, sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:24]
        self._log = self.folder / "measured.jsonl"
        self.measured = world.hand_out({} if world.rank else self._begun(resume))
        """Lists of KL, one value per window, by the name of the measurement."""

    def _begun(self, resume: bool) -> dict[str, list[float]]:
        """The earlier measurements, if the folder exists."""
        if not resume:
            shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "model").mkdir(parents=True, exist_ok=True)
        return _lines(self._log)

    def store(self, family: Family, blocks: int) -> PartialCheckpoint:
        """The checkpoint of the model with nothing raised."""
        return PartialCheckpoint(self.folder / "model", family, blocks)

    def keep_site(self, cell: Cell, choice: Choice, tensors: dict[str, Tensor]) -> None:
        """Keep a site in one of the other ways, by the names of its tensors in the block."""
        path = self._path(cell, choice)
        path.parent.mkdir(exist_ok=True)
        write_tensors(path, tensors)

    def site(self, cell: Cell, choice: Choice) -> dict[str, Tensor]:
        """The tensors that `keep_site` was given."""
        return load_file(self._path(cell, choice))

    def has_sites(self, raises: Mapping[Cell, Sequence[Choice]]) -> bool:
        """True if all of these sites are there."""
        return all(self._path(cell, choice).exists() for cell, choices in raises.items() for choice in choices)

    def note(self, what: str, kl: Sequence[float]) -> None:
        """Keep a measurement that all processes know. It survives an interrupted search."""
        self.measured[what] = list(kl)
        if self.world.rank:
            return
        with self._log.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps({"what": what, "kl": list(kl)}))  # also after an unfinished line

    def _path(self, cell: Cell, choice: Choice) -> Path:
        return self.folder / choice.spelled.replace("/", "-") / f"{cell.block:05d}-{cell.kind}.safetensors"


def _lines(path: Path) -> dict[str, list[float]]:
    """The measurements of a file. A last line that is incomplete is ignored."""
    found: dict[str, list[float]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                table = json.loads(line)
                found[str(table["what"])] = [float(value) for value in table["kl"]]
            except (ValueError, KeyError, TypeError):
                continue
    return found
