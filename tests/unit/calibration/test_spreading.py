"""Where the blocks of a model that writes text go, for memories of made-up sizes."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny_model import tiny_config
from tests.unit.checkpoint.folders import recipe
from tests.unit.planning.shapes import LLAMA_3_8B, LLAMA_3_70B, run_of

from mxrot.calibration import spreading
from mxrot.calibration.spreading import USED, Room, Spread, room_here, spread_over
from mxrot.calibration.writing_sizes import WritingSizes
from mxrot.errors import ConfigError

MAIN = math.inf


def sizes_of(config: Any = LLAMA_3_70B, windows: int = 128, seq_len: int = 2048, **changes: Any) -> WritingSizes:
    return run_of(config, recipe("mxrot", **changes), windows, seq_len, torch.bfloat16, "cuda").writing


def room(*gigabytes: float, host: float = MAIN, disk: float = 0.0) -> Room:
    names = tuple(f"cuda:{number}" for number in range(len(gigabytes)))
    return Room(names, tuple(1e9 * size for size in gigabytes), 1e9 * host, 1e9 * disk)


def spread(sizes: WritingSizes, where: Room) -> Spread:
    found = spread_over(sizes, where)
    assert found is not None
    return found


def test_what_fits_as_a_whole_is_not_spread() -> None:
    """To the byte, by the plan's own count; more GPUs change nothing."""
    sizes = sizes_of(LLAMA_3_8B)
    needed = sizes.on_one_device
    assert sizes.weights < needed < 1.4 * sizes.weights
    exact = replace(room(1, 1), free=(needed, 1e9))
    assert spread_over(sizes, exact) is None
    assert spread_over(sizes, replace(exact, free=(needed - 1, 1e9))) is not None


def test_gpus_that_hold_it_together_stream_nothing() -> None:
    found = spread(sizes_of(), room(141, 141))
    assert found.streamed == 0 and set(found.lies) == {"device"} and found.seconds_to_stream == 0
    assert list(found.computes) == sorted(found.computes) and set(found.computes) == {0, 1}
    assert found.said == (
        f"The model that writes the text is spread over cuda:0 and cuda:1, {found.at_once} sequences at a time"
    )


def test_one_gpu_streams_what_it_cannot_keep() -> None:
    found = spread(sizes_of(), room(80))
    kept = found.bytes_in("device")
    assert found.computes == (0,) * 80 and kept > 0 and found.bytes_in("disk") == 0
    assert kept + found.streamed == pytest.approx(sum(found.sizes.blocks))
    assert sum(found.terms(0).values()) <= USED * 80e9
    assert found.said == (
        f"The model that writes the text is spread over cuda:0 and main memory, {found.at_once} sequences at a time"
    )
    passes = found.sizes.sequences / found.at_once * (256 + 2 * 16)  # first tokens are drawn
    assert found.steps == passes
    assert found.seconds_to_stream == pytest.approx(passes * found.streamed / spreading.HOST_BYTES)


def test_as_many_sequences_at_a_time_as_take_the_least_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against each power of two by itself; and where weights come for nothing, the passes themselves decide."""
    sizes, where = sizes_of(), room(80)
    tried = [spreading._spread(sizes, where, at_once) for at_once in (1024, 512, 256, 128, 64, 1)]
    assert tried[0] is None and all(tried[1:])  # no room for keys and values of all
    seconds = [one.seconds_to_stream for one in tried if one is not None]
    best = spread(sizes, where)
    assert best.seconds_to_stream == min(seconds) and seconds[-1] > 10 * min(seconds)
    assert spread(sizes_of(windows=1), where).at_once == 8  # all there are


@pytest.mark.parametrize("host", [60.0, 116.0, 1000.0])
def test_the_text_does_not_depend_on_main_memory(host: float) -> None:
    """How many sequences are written together decides about bits; what main memory cannot take lies on disk."""
    found, best = spread(sizes_of(), room(80, host=host, disk=1000)), spread(sizes_of(), room(80))
    assert (found.at_once, found.computes, found.streamed) == (best.at_once, best.computes, best.streamed)
    assert found.bytes_in("main memory") <= USED * host * 1e9
    assert ("disk" in found.lies) == (host < 1000) and ("disk" in found.said) == (host < 1000)
    assert found.seconds_to_stream >= best.seconds_to_stream


def test_a_gpu_that_another_program_fills_is_left_out() -> None:
    found = spread(sizes_of(), room(80, 1, 80))
    assert found.used == [0, 2] and "cuda:1" not in found.said
    assert set(found.as_table()["devices"]) == {"cuda:0", "cuda:2"}


@pytest.mark.parametrize(
    ("changes", "where", "said"),
    [
        ({}, room(80, host=50, disk=20), r"takes 141\.1 GB, of which \d+\.\d GB are left over by cuda:0: 45\.0 GB of "),
        ({}, room(80, host=50, disk=20), r"18\.0 GB of disk \(\$TMPDIR\) are available; give a text of your own, and "),
        (
            {},
            room(4),
            r"of which 6\.\d GB have to be on cuda:0: 3\.6 GB are available; .* set calibration\.generated = 0$",
        ),
        (
            {"calibration__generated": 0.0, "calibration__own": 64},
            room(4),
            r"set calibration\.own = 0 \(--calib with a",
        ),
    ],
)
def test_where_there_is_not_room_enough(changes: dict[str, Any], where: Room, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        spread_over(sizes_of(**changes), where)


@cache
def tiny_sizes(blocks: int) -> WritingSizes:
    return sizes_of(tiny_config(num_hidden_layers=blocks, architectures=["LlamaForCausalLM"]), 1, 32)


@given(
    st.lists(st.floats(0.0, 3.0), min_size=1, max_size=4),
    st.integers(1, 7),
    st.integers(1, 40),
    st.floats(0.0, 3.0),
    st.floats(0.0, 3.0),
)
def test_nothing_is_fuller_than_it_may_be(
    gpus: list[float], blocks: int, windows: int, host: float, disk: float
) -> None:
    """Memories are multiples of a tiny model; every block has one place, and blocks follow each other over devices."""
    sizes = tiny_sizes(blocks).writing(windows)
    sizes = replace(sizes, blocks=tuple(size * (1 + index) for index, size in enumerate(sizes.blocks)))
    unit = sizes.weights
    where = Room(tuple(map(str, range(len(gpus)))), tuple(unit * part for part in gpus), unit * host, unit * disk)
    try:
        found = spread_over(sizes, where)
    except ConfigError:
        return
    if found is None:
        assert sizes.on_one_device <= where.free[0]
        return
    assert 1 <= found.at_once <= sizes.sequences
    assert len(found.computes) == len(found.lies) == blocks and list(found.computes) == sorted(found.computes)
    for device, free in enumerate(where.free):
        assert sum(found.terms(device).values()) <= USED * free * (1 + 1e-9)
    assert found.bytes_in("main memory") <= USED * where.host and found.bytes_in("disk") <= USED * where.disk
    keys = sum(found.terms(device).get("keys and values", 0.0) for device in found.used)
    assert keys == pytest.approx(found.at_once * sizes.keys(32))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spreading, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package accelerate: pip install 'mxrot\[spread\]'$"):
        spreading.check_spreads()


def test_other_gpus_are_asked_only_where_the_first_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """And those that may not be asked are left out: of three, the second."""
    asked: list[int] = []

    def mem_get_info(number: int) -> tuple[int, int]:
        asked.append(number)
        if number == 1:
            raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable")
        return 10 + number, 100

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(spreading, "available_memory", lambda: 1000.0)
    device = torch.device("cuda", 2)
    enough = room_here(device, 12)
    assert enough is not None and (enough.devices, enough.free, enough.host) == (("cuda:2",), (12.0,), 1000.0)
    assert asked == [2] and enough.disk > 0
    small = room_here(device, 13)
    assert small is not None and (small.devices, small.free) == (("cuda:2", "cuda:0"), (12.0, 10.0))
    assert room_here(torch.device("cpu"), 13) is None
