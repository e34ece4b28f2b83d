"""A disk that is full from the k-th write on, for every k: `python -m tests.faults.full_disk FOLDER`.

Each run has to end with one line and exit code 1, leave what stood at the output as it was, and be resumed to the same
bytes once there is room. Prints counts, and exits with 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from pathlib import Path

from tests.faults.forked import RECIPES, Events, Workshop, contents, run


def refuse() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def count_writes(shop: Workshop, recipe: str) -> int:
    """How often an undisturbed run asks for room: opens for writing, makes a folder, writes."""
    shop.clear()
    note = shop.folder / "count"

    def fault() -> None:
        events = Events(shop.place, 0, lambda: None, writes_only=True)
        events.act = lambda: note.write_text(str(events.count))
        events.install()

    run(shop.words(recipe), shop.log, fault)
    return int(note.read_text())


def one_round(shop: Workshop, recipe: str, k: int, has_old: bool) -> list[str]:
    """What was wrong when the disk was full from the k-th write on."""
    wanted = shop.wanted(recipe)
    shop.clear("rtn" if has_old else None)
    before = contents(shop.output) if has_old else None
    force = ["--force"] if has_old else []
    events = Events(shop.place, k, refuse, writes_only=True)
    ended = run(shop.words(recipe, *force), shop.log, events.install)
    wrong = []
    said = [line for line in ended.text.splitlines() if line.startswith("mxrot: error: ")]
    if ended.code != 1 or len(said) != 1 or "space" not in said[0] or "Traceback" in ended.text:
        wrong.append(f"exit code {ended.code}: {ended.text[-500:]}")
    if has_old and contents(shop.output) != before:
        wrong.append("what stood at the output is not what it was")
    if not has_old and shop.output.exists():
        wrong.append("there is an output")
    again = run(shop.words(recipe, "--resume", *force), shop.log)
    if again.code or contents(shop.output) != wanted:
        wrong.append(f"resumed to something else, exit code {again.code}: {again.text[-500:]}")
    if shop.look_at_foreign() != shop.foreign:
        wrong.append("something of somebody else's is gone")
    if left := shop.leftovers():
        wrong.append(f"left behind: {', '.join(left)}")
    return [f"{recipe}, full from write {k} on{', --force' if has_old else ''}: {what}" for what in wrong]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--every", type=int, default=1, help="only each so-manieth write")
    asked = parser.parse_args()
    shop = Workshop(asked.folder.resolve() / "shop")
    shop.wanted("rtn")
    wrong, disks = [], 0
    for recipe in asked.recipes.split(","):
        writes = count_writes(shop, recipe)
        shop.wanted(recipe)
        for k in range(1, writes + 1, asked.every):
            wrong += one_round(shop, recipe, k, has_old=recipe != "rtn" and k % 2 == 0)
            disks += 1
    print(f"full disks: {disks}, each resumed to the same bytes but for: {len(wrong)}", *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
