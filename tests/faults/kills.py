"""Kill runs of `mxrot quantize` at random moments, resume each, and compare: `python -m tests.faults.kills FOLDER`.

Half of the kills come at a random time, half at a random thing that is done to a file, so that the few microseconds in
which folders change places have their share. A third of the resumed runs is killed again. Under --force a watcher
looks whether there is an output, all the time. Prints counts, and exits with 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event, Thread

from tests.faults.forked import RECIPES, Ended, Events, Workshop, contents, run, send, start, wait

SECONDS_APART = 12.0
"""In which a process of its own has loaded its modules and quantized, on a machine that has nothing else to do."""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass
class Tally:
    """What came of the kills."""

    kills: int = 0
    same: int = 0
    finished: int = 0
    """Commands that were done before the signal came."""
    resumed: int = 0
    """Kills that a resumption came after."""
    looks: int = 0
    """At an output that had to be there."""
    by_signal: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        signals = ", ".join(f"{name} {count}" for name, count in sorted(self.by_signal.items()))
        return [
            f"kills: {self.kills} ({signals}); {self.finished} commands were done before",
            f"resumed to the same bytes: {self.same} of {self.resumed}",
            f"looks at an output under --force: {self.looks}",
            f"wrong: {len(self.wrong)}",
            *self.wrong,
        ]


class Watcher(Thread):
    """Looks whether the output is there, until told to stop."""

    def __init__(self, output: Path) -> None:
        super().__init__(daemon=True)
        self.output, self.over = output / "config.json", Event()
        self.looks = self.misses = 0

    def run(self) -> None:
        while not self.over.is_set():
            self.looks += 1
            self.misses += not os.path.exists(self.output)
            if self.looks % 64 == 0:
                time.sleep(0.0005)  # the run shall go on, too


def disturb_apart(shop: Workshop, words: list[str], chance: random.Random, number: int) -> Ended:
    """The same in a process of its own, over all of its life: while Python starts and modules are loaded, too."""
    started = time.monotonic()
    with shop.log.open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "mxrot", *words], stdout=log, stderr=log)
    time.sleep(chance.uniform(0.1, SECONDS_APART))
    process.send_signal(number)
    return Ended(process.wait(), shop.log.read_text(errors="replace"), time.monotonic() - started)


def disturb(shop: Workshop, words: list[str], chance: random.Random, number: int, recipe: str, count: int) -> Ended:
    """Run the command and send it a signal, at a random moment or at a random thing that it does to files."""
    if chance.random() < 0.5:
        events = Events(shop.place, chance.randint(1, count), partial(send, number))
        return run(words, shop.log, events.install)
    started = time.monotonic()
    child = start(words, shop.log)
    time.sleep(chance.uniform(0, 1.02 * shop.seconds[recipe]))
    os.kill(child, number)
    return wait(child, shop.log, started)


def count_events(shop: Workshop, recipe: str) -> int:
    """How many things an undisturbed run does to files."""
    shop.clear()
    note = shop.folder / "count"

    def fault() -> None:
        events = Events(shop.place, 0, lambda: None)
        events.install()
        leave = os._exit
        os._exit = lambda code: (note.write_text(str(events.count)), leave(code))  # type: ignore[assignment,func-returns-value]

    run(shop.words(recipe), shop.log, fault)
    return int(note.read_text())


def check_end(ended: Ended, number: int, tally: Tally, where: str) -> bool:
    """Note how a disturbed command ended; whether it was killed."""
    if ended.code == 0:
        tally.finished += 1
        return False
    tally.kills += 1
    tally.by_signal[signal.Signals(number).name] += 1
    if number == signal.SIGKILL:
        if ended.code != -number:
            tally.wrong.append(f"{where}: exit code {ended.code}: {ended.text[-300:]}")
        return True
    said = [line for line in ended.text.splitlines() if line.startswith("mxrot: error: ")]
    code = 143 if number == signal.SIGTERM else 1
    if ended.code != code or len(said) != 1 or "Traceback" in ended.text or "interrupted" not in said[0]:
        tally.wrong.append(f"{where}: exit code {ended.code}: {ended.text[-600:]}")
    return True


def one_round(shop: Workshop, recipe: str, chance: random.Random, tally: Tally, count: int, watched: bool) -> None:
    """Disturb a run, and perhaps its resumption; resume it, and compare. A `count` of 0 stands for a process apart."""
    number = chance.choice(SIGNALS)
    where = f"{recipe}, {signal.Signals(number).name}{', --force' if watched else ''}, kill {tally.kills + 1}"
    wanted = shop.wanted(recipe)
    shop.clear("rtn" if watched else None)
    force = ["--force"] if watched else []
    watcher = Watcher(shop.output)
    if watched:
        watcher.start()
    words = shop.words(recipe, *force)
    first = disturb(shop, words, chance, number, recipe, count) if count else disturb_apart(shop, words, chance, number)
    kills = int(check_end(first, number, tally, where))
    resume = shop.words(recipe, "--resume", *force)
    if kills and count and chance.random() < 1 / 3:
        again = chance.choice(SIGNALS)
        second = disturb(shop, resume, chance, again, recipe, count)
        kills += check_end(second, again, tally, f"{where}, resumed")
    if kills:
        tally.resumed += kills
        ended = run(resume, shop.log)
        is_same = ended.code == 0 and contents(shop.output) == wanted
        tally.same += kills * is_same
        if not is_same:
            tally.wrong.append(f"{where}: resumed to something else, exit code {ended.code}: {ended.text[-600:]}")
    watcher.over.set()
    if watched:
        watcher.join()
        tally.looks += watcher.looks
        if watcher.misses:
            tally.wrong.append(f"{where}: no output at {watcher.misses} of {watcher.looks} looks")
    if shop.look_at_foreign() != shop.foreign:
        tally.wrong.append(f"{where}: something of somebody else's is gone")
    if left := shop.leftovers():
        tally.wrong.append(f"{where}: left behind: {', '.join(left)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--apart", type=int, default=4, help="rounds with a process of its own")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    asked = parser.parse_args()
    chance, tally, shop = random.Random(asked.seed), Tally(), Workshop(asked.folder.resolve() / "shop")
    shop.wanted("rtn")
    recipes = asked.recipes.split(",")
    counts = {recipe: count_events(shop, recipe) for recipe in recipes}
    rounds = 0
    while tally.kills < asked.kills and rounds < 4 * asked.kills:
        recipe = recipes[rounds % len(recipes)]
        watched = recipe != "rtn" and chance.random() < 0.5  # another one than what stands there
        is_apart = asked.apart > 0 and rounds % (asked.kills // asked.apart) == 0
        one_round(shop, recipe, chance, tally, 0 if is_apart else counts[recipe], watched)
        rounds += 1
    print("\n".join(tally.lines()))
    return 1 if tally.wrong or tally.kills < asked.kills else 0


if __name__ == "__main__":
    sys.exit(main())
