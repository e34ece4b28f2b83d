"""The processes of one run, started by torchrun, accelerate or a cluster: how they join, and how they end together.

Only environment variables that all of these launchers set are read. An exchange of tensors waits as long as one process
works alone. Each process therefore also counts in the store of the rendezvous, and watches the counts of the others.
The first process that fails writes its error to the store, and the others raise this error. If a process does not
return from an exchange, its watch ends it.
"""

from __future__ import annotations

import json
import os
import time
from _thread import interrupt_main
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Event, Thread
from traceback import walk_tb
from typing import Any, cast

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from mxrot.calibration.world import ONE, ProcessWorld, World
from mxrot.environment import check_device
from mxrot.errors import ConfigError, MxrotError, RankError, add_note, is_left_to_another, leave_to_another, notes_of
from mxrot.failures import machine_failure
from mxrot.interrupts import exit_code

JOIN = timedelta(seconds=45)
"""The time within which all processes must join."""
EXCHANGE = timedelta(days=7)
"""The timeout of an exchange. While one process writes text, the others wait. The watch detects lost processes."""
BEAT_SECONDS = 1.0
LOST_SECONDS = 35.0
"""A process whose count has not changed for this time counts as lost."""
GRACE_SECONDS = 4.0
"""The time for a process to end by itself, because its exchange fails. Then it is interrupted, then ended at once."""
_FAILED = "failed"
_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_open: World | None = None
"""The world that is joined now."""


@contextmanager
def joined(device: str | None = None) -> Iterator[World]:
    """While open, the world of all processes of this run, each on its own GPU or on the CPU. A nested call gives the
    same world. There is one process if the environment names no others, or if the program has joined them itself.

    An error in one process ends all of them: the others raise RankError with the error of the first that failed.
    """
    global _open
    place = None if _open is not None or distributed.is_initialized() else _place()
    if place is None:
        yield _open or ONE
        return
    watch = _join(*place)
    try:
        _open = ProcessWorld(_device(device, int(os.environ.get("LOCAL_RANK", place[0]))))
        yield _open
        _open.count(0)  # all processes have reached the end
    except BaseException as error:
        try:
            first = watch.first(error)
        except KeyboardInterrupt as interrupt:  # torchrun ends the other processes, too
            first = interrupt
        if first is error:
            raise
        for note in notes_of(error):
            add_note(first, note)
        raise first from error
    finally:
        _open = None
        watch.over.set()
        with suppress(Exception):
            distributed.destroy_process_group()


def current() -> World:
    """The world that an enclosing `joined` has joined. Otherwise one process."""
    return _open or ONE


def _place() -> tuple[int, int] | None:
    """The rank of this process and the number of processes. None if it is the only one."""
    found = {name: os.environ.get(name) for name in _NAMES}
    if found["RANK"] is None or found["WORLD_SIZE"] in (None, "1"):
        return None
    lacking = [name for name, value in found.items() if value is None]
    if lacking:
        raise ConfigError(f"RANK and WORLD_SIZE are set and {' and '.join(lacking)} not; start with torchrun")
    try:
        rank, size = int(str(found["RANK"])), int(str(found["WORLD_SIZE"]))
    except ValueError:
        rank, size = -1, 0
    if not 0 <= rank < size:
        raise ConfigError(f"RANK {found['RANK']} of WORLD_SIZE {found['WORLD_SIZE']} is not the number of a process")
    return rank, size


def _join(rank: int, size: int) -> _Watch:
    """Meet the other processes."""
    try:
        store, _, _ = next(rendezvous("env://", timeout=JOIN))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and distributed.is_nccl_available() else "gloo"
        store.set_timeout(JOIN)
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=EXCHANGE)
        store.add("there", 1)
        deadline = time.monotonic() + JOIN.total_seconds()
        while store.add("there", 0) < size:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{store.add('there', 0)} have come")
            time.sleep(0.05)
    except (RuntimeError, ValueError) as error:
        with suppress(Exception):
            distributed.destroy_process_group()
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RankError(
            f"rank {rank}: the {size} processes did not meet at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} within {JOIN.seconds} s ({lines[0]}); see whether all were started"
        ) from error
    watch = _Watch(store, rank, size)
    watch.start()
    return watch


def _device(asked: str | None, local: int) -> torch.device:
    """The device of this process."""
    if asked is not None:
        check_device(asked)
    device = torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda":
        return device
    if ":" in str(asked):
        raise ConfigError(f"device {asked}: each process takes the GPU that LOCAL_RANK numbers; give cuda, or cpu")
    if local >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK {local}: there are {torch.cuda.device_count()} GPUs; start no more processes, or take the CPU"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


class _Watch(Thread):
    """Counts for this process, and watches the counts of the others."""

    def __init__(self, store: distributed.Store, rank: int, size: int) -> None:
        super().__init__(daemon=True)
        self.over = Event()
        """Set when there is nothing left to watch."""
        # A separate connection: the other one may be waiting.
        self._store: distributed.Store = cast(Any, store).clone()
        self._rank, self._others = rank, [other for other in range(size) if other != rank]

    def run(self) -> None:
        """Count and watch until `over` is set."""
        beats = dict.fromkeys(self._others, -1)
        moved = dict.fromkeys(self._others, time.monotonic())
        while not self.over.wait(BEAT_SECONDS):
            found = None
            try:
                now, seen = time.monotonic(), self._beats()
                moved |= {other: now for other in self._others if seen[other] != beats[other]}
                beats = seen
                lost = [other for other in self._others if now - moved[other] > LOST_SECONDS]
                if lost:
                    self._leave(lost[0], _LOST, 1)
                found = self._found()
            except (RuntimeError, ValueError):
                found = self._storeless()
            if found is not None:
                self._end(found)
                return

    def first(self, error: BaseException) -> BaseException:
        """The error that the run ends with, given the `error` that this process has seen."""
        self.over.set()
        try:
            if _is_of_exchange(error):
                return self._found() or self._lost()
            said, code = _said(error)
            self._leave(self._rank, said, code)
            found = self._found()
            if self._rank == 0:
                time.sleep(1.5 * BEAT_SECONDS)  # the store may end with this process: the others must read it first
        except (RuntimeError, ValueError):
            found = self._storeless()
            return found if _is_of_exchange(error) else error
        if found is not None and found.rank != self._rank:
            return found
        if self._rank and (isinstance(error, (MxrotError, KeyboardInterrupt)) or machine_failure(error)):
            leave_to_another(error)
        return error

    def _beats(self) -> dict[int, int]:
        self._store.add(f"beat {self._rank}", 1)
        return {other: self._store.add(f"beat {other}", 0) for other in self._others}

    def _leave(self, rank: int, said: str, code: int) -> None:
        """Write an error for all processes, unless there is one already."""
        self._store.compare_set(_FAILED, "", json.dumps([rank, said, code]))

    def _found(self) -> RankError | None:
        """The first error of the run."""
        if not self._store.check([_FAILED]):
            return None
        rank, said, code = json.loads(self._store.get(_FAILED))
        error = RankError(f"rank {rank}: {said}", rank, code)
        if self._rank and (rank, said) != (0, _LOST):  # the first process reports it
            leave_to_another(error)
        return error

    def _storeless(self) -> RankError:
        return RankError("rank 0: has ended, and with it the rendezvous of all", 0)

    def _lost(self) -> RankError:
        """The error if an exchange fails without a reported error. Processes that no longer count were killed."""
        before = self._beats()
        for _ in range(3):
            time.sleep(BEAT_SECONDS)
            after = self._beats()
            if found := self._found():
                return found
        lost = [other for other in self._others if before[other] == after[other]]
        if lost:
            self._leave(lost[0], _LOST, 1)
        return self._found() or RankError("the exchange with another process has failed", self._rank)

    def _end(self, error: RankError) -> None:
        """End this process, which may be waiting in an exchange that never finishes."""
        if self.over.wait(GRACE_SECONDS):
            return
        interrupt_main()
        if self.over.wait(GRACE_SECONDS):
            return
        if not is_left_to_another(error):
            os.write(2, f"mxrot: error: {error}; what was finished is kept, and --resume continues from it\n".encode())
        os._exit(error.exit_code)


_LOST = "was lost, by a kill or with its machine"


def _said(error: BaseException) -> tuple[str, int]:
    """The text of an error, and its exit code."""
    known = error if isinstance(error, MxrotError) else machine_failure(error)
    if known is not None:
        return str(known), known.exit_code
    lines = str(error).strip().splitlines()
    if isinstance(error, KeyboardInterrupt):
        return lines[0] if lines else "interrupted", exit_code(getattr(error, "number", None))
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__, 1


def _is_of_exchange(error: BaseException) -> bool:
    """True if the error was raised because another process has gone."""
    found: BaseException | None = error
    while found is not None:
        names = (frame.f_globals.get("__name__", "") for frame, _ in walk_tb(found.__traceback__))
        if isinstance(found, RuntimeError) and any(name.startswith("torch.distributed") for name in names):
            return machine_failure(found) is None
        found = found.__cause__ or found.__context__
    return False
