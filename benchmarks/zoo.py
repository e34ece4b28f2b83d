"""Which of many configs `mxrot plan` takes, and why it refuses the others.

    python benchmarks/zoo.py FOLDER [--recipe mxrot] [--out FILE.json]

Each *.json of FOLDER is a config.json of transformers, whatever the file is called. No weight is read, and no time is
measured. A config is taken, or refused in a sentence; anything else that is raised is wrong, and the exit status 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mxrot.environment import versions
from mxrot.errors import MxrotError
from mxrot.planning import Machine, OtherRates, make_plan
from mxrot.planning.rates import Rates
from mxrot.recipe import Recipe, load_recipe

TAKEN, REFUSED, WRONG = "taken", "refused", "wrong"
WIDTH = 110
"""Letters of a reason in the table; the file has all."""
NO_TIME = OtherRates("none", "cpu", Rates(*[1.0] * len(Rates.__dataclass_fields__)))
"""Time is planned of these rates, and not shown."""


@dataclass(frozen=True)
class Verdict:
    """What became of a config."""

    name: str
    """Of the file, without its ending."""
    architecture: str
    status: str
    """TAKEN, REFUSED or WRONG."""
    reason: str = ""
    """Why it is refused, or the traceback; empty where it is taken."""
    parameters: int | None = None
    bits_per_weight: float | None = None


def judge(path: Path, recipe: Recipe) -> Verdict:
    """The verdict on one config."""
    name, architecture = path.stem, _architecture(path)
    try:
        plan = make_plan(name, path, recipe, Machine(torch.device("cpu"), other=NO_TIME))
    except MxrotError as error:
        return Verdict(name, architecture, REFUSED, str(error))
    except Exception:
        return Verdict(name, architecture, WRONG, traceback.format_exc())
    if plan.problems:
        return Verdict(name, architecture, REFUSED, "; ".join(plan.problems))
    if plan.sizes is None:
        return Verdict(name, architecture, WRONG, "it is not refused, and its plan has no sizes")
    return Verdict(name, architecture, TAKEN, "", plan.sizes.shape.parameters, plan.sizes.after.bits_per_weight)


def _architecture(path: Path) -> str:
    try:
        named = json.loads(path.read_text(encoding="utf-8"))["architectures"]
        return str(named[0])
    except (ValueError, LookupError, TypeError):
        return "-"


def judge_all(folder: Path, recipe: Recipe) -> list[Verdict]:
    """The verdicts on all configs of a folder, by name."""
    return [judge(path, recipe) for path in sorted(folder.glob("*.json"))]


def counts(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """How many there are of each status."""
    found = Counter(verdict.status for verdict in verdicts)
    return {status: found[status] for status in (TAKEN, REFUSED, WRONG)}


def table(verdicts: list[Verdict]) -> str:
    """A line each, those of a status together, and the counts."""
    lines = []
    for status in (TAKEN, REFUSED, WRONG):
        for one in (verdict for verdict in verdicts if verdict.status == status):
            lines.append(f"{status:8} {one.name:55.55} {one.architecture:36.36} {_said(one)}".rstrip())
    return "\n".join([*lines, ", ".join(f"{status} {count}" for status, count in counts(verdicts).items())])


def _said(verdict: Verdict) -> str:
    if verdict.parameters is not None:
        return f"{verdict.parameters / 1e9:.2f} B parameters, {verdict.bits_per_weight:.2f} bits a weight"
    line = verdict.reason.strip().splitlines()[-1].removeprefix(f"{verdict.name}: ")
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..."


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--recipe", default="mxrot")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    verdicts = judge_all(options.folder, load_recipe(options.recipe))
    if not verdicts:
        parser.error(f"{options.folder}: holds no *.json")
    print(table(verdicts))
    if options.out is not None:
        rows = [asdict(verdict) for verdict in verdicts]
        found = {"recipe": options.recipe, "counts": counts(verdicts), "configs": rows, "versions": versions()}
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 1 if counts(verdicts)[WRONG] else 0


if __name__ == "__main__":
    sys.exit(main())
