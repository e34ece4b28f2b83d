"""What comes of opening a damaged checkpoint."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tests.cases.commands import logits
from tests.cases.commands import mxrot as command
from tests.faults.mutations import draw
from tests.faults.originals import Original
from transformers import AutoModelForCausalLM, PreTrainedModel

import mxrot
from mxrot.errors import MOST_CHARACTERS, MxrotError

MOST_LETTERS = MOST_CHARACTERS + 200
"""Of a message: what is quoted in it may be longer when it is escaped."""


@dataclass
class Tally:
    """What mutations have come to."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, outcome: str, what: str) -> None:
        self.counts[outcome.partition(":")[0]] += 1
        if outcome.startswith("wrong"):
            self.wrong.append(f"{what}: {outcome}")

    def __str__(self) -> str:
        return (
            f"openings {self.counts.total()}: loads right {self.counts['right']}, clean errors {self.counts['clean']}, "
            f"another model where nothing was hashed {self.counts['unhashed']}, wrong {self.counts['wrong']}"
        )


def tried(original: Original, seed: int, place: Path, tally: Tally) -> None:
    """Damage a copy of a checkpoint, and open it in every way that this seed is for."""
    folder = Path(shutil.copytree(original.folder, place / f"{seed}"))
    kind = draw(seed)
    what = f"{original.name}, seed {seed}, {kind.name}"
    try:
        kind.damage(folder, random.Random(f"{original.name}{seed}"))
        changes = kind.changes
        if original.has_hashes or not changes:
            tally.add(opened(lambda: mxrot.load(folder, "cpu"), original), f"{what}, load")
        tally.add(opened(lambda: mxrot.load(folder, "cpu", verify=False), original, changes), f"{what}, not hashed")
        if kind.by_transformers and seed % 5 == 0 and (original.has_hashes or not changes):
            tally.add(opened(lambda: by_transformers(folder), original), f"{what}, from_pretrained")
        if seed % 25 == 0:
            text = place / "text.txt"
            text.write_text("some words to score, " * 20)
            for words in (("eval", folder, "--text", text), ("generate", folder, "x"), ("export", folder)):
                few = ("--max-tokens", "2") if words[0] == "generate" else ()
                few = ("--seq-len", "16", "--windows", "1") if words[0] == "eval" else few
                tally.add(commanded(*words, *few), f"{what}, {words[0]}")
    finally:
        shutil.rmtree(folder)


def by_transformers(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def opened(load: Callable[[], PreTrainedModel], original: Original, changes: bool = False) -> str:
    """`changes` allows another model: nothing was hashed."""
    try:
        found = logits(load())
    except MxrotError as error:
        message = str(error)
        is_clean = "\n" not in message and len(message) <= MOST_LETTERS and message.isprintable()
        return "clean" if is_clean else f"wrong: a message of {len(message)} letters: {message[:100]!r}"
    except Exception as error:
        return ("clean" if changes and "shape" in str(error) else "wrong") + f": {type(error).__name__}: {error}"[:300]
    if found.shape == original.logits.shape and torch.equal(found, original.logits):
        return "right"
    return "unhashed" if changes else "wrong: other logits"


def commanded(*words: str | Path) -> str:
    """A command ends well, or with one line and exit code 2."""
    result = command(*words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return f"wrong: {result.exception!r}"[:300]
    if result.exit_code == 0:
        return "right"
    lines = [line for line in result.stderr.splitlines() if line.startswith("mxrot: error: ")]
    return "clean" if result.exit_code == 2 and len(lines) == 1 else f"wrong: exit code {result.exit_code}: {lines}"
