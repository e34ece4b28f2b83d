"""Kill a random one of two processes of `mxrot quantize` at a random time, resume, and compare:
`python -m tests.faults.rank_kills FOLDER --kills 20`.

Prints counts, and exits with 1 if bytes differ, or if anything takes a minute.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
from functools import partial
from pathlib import Path
from threading import Timer

from tests.tiny_model import write_tiny_model
from tests.unit.checkpoint.folders import digests, without_run
from tests.unit.ranked import MOST_SECONDS, commands


def killed_after(seconds: float) -> None:
    timer = Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()


def main(folder: Path, kills: int, seed: int) -> int:
    """Number of wrong ends."""
    chance = random.Random(seed)
    write_tiny_model(folder / "tiny")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400)
    output = folder / "out"
    words = ["quantize", str(folder / "tiny"), "-o", str(output), "--calib", str(folder / "text.txt")]
    words += ["--samples", "16", "--seq-len", "32"]
    whole = commands(folder, words, 2, {})
    assert [one.code for one in whole] == [0, 0], whole
    wanted, length = without_run(digests(output)), max(one.seconds for one in whole)
    wrong: list[str] = []
    done = longest = 0.0
    for number in range(kills):
        for path in folder.glob("out*"):
            shutil.rmtree(path)
        rank = chance.randrange(2)
        ended = commands(folder, words, 2, {rank: partial(killed_after, chance.uniform(0.0, length))})
        done += all(one.code == 0 for one in ended)
        took = max(one.seconds for one in ended)
        longest = max(longest, took)
        if took >= MOST_SECONDS or (ended[rank].code == -signal.SIGKILL and ended[1 - rank].code == 0):
            wrong.append(f"{number}: rank {rank}: {ended}")
        again = commands(folder, [*words, "--resume"], 2, {})
        if [one.code for one in again] != [0, 0] or without_run(digests(output)) != wanted:
            wrong.append(f"{number}: rank {rank}: resumed: {again}")
    print(f"kills: {kills}, of which {done:.0f} came too late; resumed to the same bytes: {kills - len(wrong)}")
    print(f"a run of {length:.1f} s; the longest one that was killed took {longest:.1f} s")
    print(*wrong, sep="\n")
    return len(wrong)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    raise SystemExit(min(1, main(given.folder, given.kills, given.seed)))
