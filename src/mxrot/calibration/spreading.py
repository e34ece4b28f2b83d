"""The placement of a model's blocks over several devices while it writes text, if no single device holds it.

Decoder blocks are assigned to the GPUs of a machine in order, as many to each as fit. If a GPU cannot keep all of its
blocks, the others are copied from main memory, or from disk, for each written token. One pass over the weights then
serves as many sequences as there is room for keys and values. More sequences leave less room for blocks, so the time
has a minimum in between. Everything outside of the blocks is on the first GPU.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, Literal

import torch

from mxrot.calibration.generation import SEQUENCES_AT_ONCE
from mxrot.calibration.writing_sizes import WritingSizes
from mxrot.environment import available_memory
from mxrot.errors import ConfigError

USED = 0.9
"""The usable share of the free bytes of a GPU, of main memory and of a disk. The rest is for temporaries, workspaces of
libraries and fragmentation."""
HOST_BYTES, DISK_BYTES, GPU_BYTES = 2e10, 1e9, 2e12
"""Bytes per second copied to a GPU from main memory and from disk, and read by the GPU itself; assumed, not
measured."""
BLOCK_SECONDS = 1e-3
"""The time to launch the operations of a block without a recording; assumed."""

Place = Literal["device", "main memory", "disk"]
"""Where the weights of a block lie between two tokens."""


@dataclass(frozen=True)
class Room:
    """The free bytes."""

    devices: tuple[str, ...]
    """The names of the devices. Quantizing computes on the first."""
    free: tuple[float, ...]
    """For each device."""
    host: float
    disk: float = 0.0
    """Free bytes in the temporary folder."""


def room_here(device: torch.device, wanted: float) -> Room | None:
    """The room on this machine; None if the device is not a GPU.

    Other GPUs are queried only if `device` has no room for the bytes `wanted`, because a query takes some memory there.
    """
    if device.type != "cuda":
        return None
    own = torch.cuda.current_device() if device.index is None else device.index
    free = {own: torch.cuda.mem_get_info(own)[0]}
    if free[own] < wanted:
        for number in range(torch.cuda.device_count()):
            with suppress(RuntimeError):  # if only one process may compute there
                free.setdefault(number, torch.cuda.mem_get_info(number)[0])
    names = tuple(f"cuda:{number}" for number in free)
    disk = shutil.disk_usage(tempfile.gettempdir()).free
    return Room(names, tuple(map(float, free.values())), available_memory() or 0.0, float(disk))


@dataclass(frozen=True)
class Spread:
    """A model that writes text on several devices."""

    sizes: WritingSizes
    devices: tuple[str, ...]
    """The names of all usable devices. Everything outside of the blocks is on the first."""
    at_once: int
    """The number of sequences written side by side."""
    computes: tuple[int, ...]
    """The device index for each block."""
    lies: tuple[Place, ...]
    """The place of each."""

    def device_of(self, block: int) -> str:
        """The device that computes a block."""
        return self.devices[self.computes[block]]

    def bytes_in(self, place: Place) -> float:
        """The bytes of decoder blocks in this place."""
        return sum(size for size, own in zip(self.sizes.blocks, self.lies, strict=True) if own == place)

    @property
    def streamed(self) -> float:
        """The bytes of weights copied to a device for each token."""
        return self.bytes_in("main memory") + self.bytes_in("disk")

    @property
    def used(self) -> list[int]:
        """The indices of the devices in use."""
        return sorted({0, *self.computes})

    def terms(self, device: int) -> dict[str, float]:
        """The bytes on one of the devices, by purpose."""
        sizes = self.sizes
        own = [block for block, where in enumerate(self.computes) if where == device]
        comes = [sizes.blocks[block] for block in own if self.lies[block] != "device"]
        found = {
            "embedding, last norm and head": 0.0 if device else sizes.outer,
            "blocks of the original model": sum(sizes.blocks[block] for block in own if self.lies[block] == "device"),
            "a block that comes from main memory": max(comes, default=0.0),
            "keys and values": len(own) * self.at_once * _keys_of_block(sizes),
            "logits and probabilities": 0.0 if device else self.at_once * sizes.logits,
        }
        return {name: value for name, value in found.items() if value}

    def rounds(self, sequences: int) -> int:
        """The number of rounds that write `sequences` sequences."""
        return -(-sequences // self.at_once)

    @property
    def steps(self) -> int:
        """The total passes over the weights."""
        drawing = self.sizes.drawing
        drawn = drawing.rounds * drawing.tokens * self.rounds(drawing.sequences)
        return self.rounds(self.sizes.sequences) * self.sizes.length + drawn

    @property
    def seconds_to_stream(self) -> float:
        """The seconds for copying weights from main memory and from disk, for all tokens."""
        return self.steps * (self.bytes_in("main memory") / HOST_BYTES + self.bytes_in("disk") / DISK_BYTES)

    @property
    def said(self) -> str:
        """A description in one line."""
        places = [self.devices[device] for device in self.used]
        places += [place for place in ("main memory", "disk") if place in self.lies]
        *most, last = places
        where = f"{', '.join(most)} and {last}" if most else last
        return f"The model that writes the text is spread over {where}, {self.at_once} sequences at a time"

    def as_table(self) -> dict[str, Any]:
        """A table for a JSON file."""
        return {
            "sequences_at_once": self.at_once,
            "devices": {
                self.devices[device]: {name: round(value) for name, value in self.terms(device).items()}
                for device in self.used
            },
            "main_memory": round(self.bytes_in("main memory")),
            "disk": round(self.bytes_in("disk")),
            "passes_over_the_weights": self.steps,
        }


def spread_over(sizes: WritingSizes, room: Room) -> Spread | None:
    """The spread of a model that writes text over the devices of `room`. None if the first one holds the whole model,
    by the plan's own count.

    The sequences at a time are all, a half, a quarter and so on, whichever takes the least time. That depends on the
    devices alone, and not on main memory. ConfigError if there is too little room in total.
    """
    if sizes.on_one_device <= room.free[0]:
        return None
    found: list[tuple[float, Spread]] = []
    at_once = min(sizes.sequences, SEQUENCES_AT_ONCE)
    while at_once:
        spread = _spread(sizes, room, at_once)
        if spread is not None:
            found.append((_seconds(spread), spread))
        at_once = -(-at_once // 2) if at_once > 1 else 0
    if not found:
        first = sizes.outer + sizes.beside + max(sizes.blocks) + sizes.keys(sizes.length) + sizes.logits
        raise _no_room(
            sizes,
            f"of which {first / 1e9:.1f} GB have to be on {room.devices[0]}: {_told(room.free[0])} GB are available",
        )
    _, best = min(found, key=lambda one: one[0])
    waits = _waiting(best, room)
    if waits is None:
        raise _no_room(
            sizes,
            f"of which {best.streamed / 1e9:.1f} GB are left over by {' and '.join(room.devices)}: "
            f"{_told(room.host)} GB of main memory and {_told(room.disk)} GB of disk ($TMPDIR) are available",
        )
    return waits


def check_spreads() -> None:
    """Raise ConfigError if the package that spreads models is missing."""
    if find_spec("accelerate") is None:
        raise ConfigError(
            "the model that writes calibration text does not fit on one device, and spreading it over several "
            "needs the package accelerate: pip install 'mxrot[spread]'"
        )


def _spread(sizes: WritingSizes, room: Room, at_once: int) -> Spread | None:
    """The spread for this many sequences at a time, with the remaining blocks in main memory. None if keys and values
    do not fit."""
    keys = at_once * _keys_of_block(sizes)
    caps = [USED * free for free in room.free]
    caps[0] -= sizes.outer + sizes.beside + at_once * sizes.logits
    if caps[0] < 0:
        return None
    computes = _in_order([size + keys for size in sizes.blocks], caps)
    lies: list[Place] = ["device"] * len(sizes.blocks)
    if computes is not None:
        return Spread(sizes, room.devices, at_once, tuple(computes), tuple(lies))
    caps = [max(0.0, cap - max(sizes.blocks)) for cap in caps]  # room for a copied block
    computes, lies = [], []
    for device, count in enumerate(_shares(len(sizes.blocks), caps)):
        left = caps[device] - count * keys
        if left < 0:
            return None
        for size in sizes.blocks[len(computes) : len(computes) + count]:
            stays = size <= left
            left -= size if stays else left
            computes.append(device)
            lies.append("device" if stays else "main memory")
    return Spread(sizes, room.devices, at_once, tuple(computes), tuple(lies)) if computes else None


def _in_order(sizes: list[float], caps: list[float]) -> list[int] | None:
    """The place of each size, filling one place after the other; None if they do not all fit."""
    found: list[int] = []
    place, left = 0, caps[0]
    for size in sizes:
        while size > left:
            place += 1
            if place == len(caps):
                return None
            left = caps[place]
        left -= size
        found.append(place)
    return found


def _shares(count: int, caps: list[float]) -> list[int]:
    """`count` things in proportion to `caps`; zeros if there is no room at all."""
    whole = sum(caps)
    if not whole:
        return []
    ends = [round(count * sum(caps[:position]) / whole) for position in range(len(caps) + 1)]
    return [end - begin for begin, end in pairwise(ends)]


def _seconds(spread: Spread) -> float:
    """The part of the time that depends on the number of sequences at a time."""
    blocks = spread.sizes.blocks
    of_step = spread.streamed / HOST_BYTES + spread.sizes.weights / GPU_BYTES + BLOCK_SECONDS * len(blocks)
    return spread.steps * of_step


def _waiting(spread: Spread, room: Room) -> Spread | None:
    """The same spread, with blocks on disk that do not fit into main memory. None if the disk is also too small."""
    host, disk = USED * room.host, USED * room.disk
    lies: list[Place] = []
    for size, place in zip(spread.sizes.blocks, spread.lies, strict=True):
        if place == "device":
            lies.append(place)
        elif size <= host:
            host -= size
            lies.append("main memory")
        elif size <= disk:
            host, disk = 0.0, disk - size
            lies.append("disk")
        else:
            return None
    return Spread(spread.sizes, spread.devices, spread.at_once, spread.computes, tuple(lies))


def _keys_of_block(sizes: WritingSizes) -> float:
    """The bytes of keys and values of one sequence in one block."""
    return sizes.keys(sizes.length) / len(sizes.blocks)


def _no_room(sizes: WritingSizes, why: str) -> ConfigError:
    choice = sizes.choice
    remedies = {
        "calibration.generated = 0": choice.generated > 0,
        "calibration.own = 0 (--calib with a text)": choice.own > 0,
    }
    return ConfigError(
        f"the original model, which is to write calibration text, takes {sizes.weights / 1e9:.1f} GB, {why}; "
        f"give a text of your own, and set {' and '.join(key for key, helps in remedies.items() if helps)}"
    )


def _told(free: float) -> str:
    return f"{USED * free / 1e9:.1f}"
