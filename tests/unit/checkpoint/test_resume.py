"""A run that was killed goes on with --resume and writes the same bytes in the end."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tests.tiny_model import random_windows, write_tiny_model
from tests.unit.checkpoint.folders import digests, recipe, without_run, write

from mxrot.checkpoint import files, fingerprint, load, side_files
from mxrot.environment import versions
from mxrot.errors import CheckpointError
from mxrot.quantizing import run as pipeline
from mxrot.recipe import Recipe

DUQUANT = recipe("duquant++")
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]

_KILLED = """
import os, signal, sys
from contextlib import contextmanager
from pathlib import Path
from mxrot.checkpoint import files
from tests.unit.checkpoint.folders import recipe, write

victim = sys.argv[3]
original = files.whole_file

@contextmanager
def whole_file(path, size):
    with original(path, size) as sink:
        if path.name == victim:
            sink.write(b"half of it")
            sink.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        yield sink

files.whole_file = whole_file
write(Path(sys.argv[1]), Path(sys.argv[2]), recipe("duquant++"))
"""


@pytest.fixture
def quantized_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Indices of blocks that were really quantized, not taken from disk."""
    seen: list[int] = []
    original = pipeline.quantize_block

    def spy(run: object, index: int, *rest: object) -> object:
        seen.append(index)
        return original(run, index, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "quantize_block", spy)
    return seen


def stopped_after(source: Path, output: Path, chosen: Recipe, blocks: int) -> Path:
    """The partial folder of a run that was interrupted after so many blocks."""

    def progress(done: int, total: int, what: str) -> None:
        if done == blocks:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(source, output, chosen, progress=progress)
    return output.with_name(output.name + ".partial")


@pytest.mark.parametrize("victim", [SHARDS[2], "run.json"])
def test_after_sigkill(source: Path, tmp_path: Path, victim: str) -> None:
    """Killed in the middle of writing a shard, and of the last file of all."""
    command = [sys.executable, "-c", _KILLED, str(source), str(tmp_path / "out"), victim]
    killed = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert (tmp_path / "out.partial" / f"{victim}.tmp").is_file() and not (tmp_path / "out").exists()
    write(source, tmp_path / "out", DUQUANT, resume=True)
    write(source, tmp_path / "straight", DUQUANT)
    assert without_run(digests(tmp_path / "out")) == without_run(digests(tmp_path / "straight"))
    load(tmp_path / "out", verify=True)


@pytest.mark.parametrize("name", ["rtn", "duquant++", "duquant++-gptq"])
def test_killed_at_every_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantized_blocks: list[int], name: str
) -> None:
    """What a killed process leaves is what lies there: a copy is taken halfway through each file, and after it."""
    snapshots: list[Path] = []
    original = files.whole_file

    def snapshot(partial: Path) -> None:
        snapshots.append(tmp_path / f"killed-{len(snapshots)}")
        shutil.copytree(partial, snapshots[-1].with_name(snapshots[-1].name + ".partial"))

    @contextmanager
    def whole_file(path: Path, size: int) -> Iterator[files.Sink]:
        with original(path, size) as sink:
            sink.file.write(b"half")
            sink.file.flush()
            snapshot(path.parent)
            sink.file.seek(0)
            sink.file.truncate()
            yield sink
        snapshot(path.parent)

    chosen = recipe(name)
    with monkeypatch.context() as patched:
        for room in (files, side_files):
            patched.setattr(room, "whole_file", whole_file)
        write(source, tmp_path / "straight", chosen)
    expected = without_run(digests(tmp_path / "straight"))
    assert len(snapshots) == 30
    done = []
    for output in snapshots:
        quantized_blocks.clear()
        run = write(source, output, chosen, resume=True)
        assert without_run(digests(output)) == expected
        assert set(run["files"]) == set(expected)
        done.append(len(quantized_blocks))
        shutil.rmtree(output)
    # Files in order: the fingerprint, three that are copied, each block and its note, all the rest. The note makes a
    # block a finished one.
    assert done == [2] * 11 + [1] * 4 + [0] * 15


@pytest.mark.parametrize("name", ["rtn", "duquant++", "duquant++-gptq"])
@pytest.mark.parametrize("finished", [1, 2])
def test_finished_blocks_are_not_done_again(
    source: Path, tmp_path: Path, quantized_blocks: list[int], name: str, finished: int
) -> None:
    stopped_after(source, tmp_path / "out", recipe(name), finished)
    quantized_blocks.clear()
    write(source, tmp_path / "out", recipe(name), resume=True)
    assert quantized_blocks == list(range(finished, 2))
    write(source, tmp_path / "straight", recipe(name))
    assert without_run(digests(tmp_path / "out")) == without_run(digests(tmp_path / "straight"))


def test_orders_of_channels_are_found_again(source: Path, tmp_path: Path, quantized_blocks: list[int]) -> None:
    chosen = recipe("mxrot", calibration__generated=0.0, transform__block=8, permutation__ffn="correlated")

    def stops(done: int, total: int, what: str) -> None:
        if done == 1 and "order of its channels" not in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(source, tmp_path / "out", chosen, progress=stops)
    quantized_blocks.clear()
    write(source, tmp_path / "out", chosen, resume=True)
    assert quantized_blocks == [1]
    write(source, tmp_path / "straight", chosen)
    assert without_run(digests(tmp_path / "out")) == without_run(digests(tmp_path / "straight"))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _change_note(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        note = json.loads(path.read_text())
        change(note)
        path.write_text(json.dumps(note))

    return damage


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "truncated shard": (SHARDS[1], _truncate),
    "empty shard": (SHARDS[1], lambda path: path.write_bytes(b"")),
    "altered shard": (SHARDS[1], _alter),
    "missing shard": (SHARDS[1], Path.unlink),
    "shard of another block": (SHARDS[1], lambda path: shutil.copy(path.with_name(SHARDS[2]), path)),
    "missing note": ("block-00000.json", Path.unlink),
    "truncated note": ("block-00000.json", _truncate),
    "note that is a list": ("block-00000.json", lambda path: path.write_text("[]")),
    "note of bytes": ("block-00000.json", lambda path: path.write_bytes(b"\xff\xfe")),
    "note without report": ("block-00000.json", _change_note(lambda note: note.pop("report"))),
    "note with an unknown field": (
        "block-00000.json",
        _change_note(lambda note: note["report"]["linears"][0].update(more=1)),
    ),
    "note with a bad shape": (
        "block-00000.json",
        _change_note(lambda note: note["report"]["linears"][0].update(shape=None)),
    ),
}


@pytest.mark.parametrize(
    "name", ["new-tuning.safetensors", "new-tuning.safetensors.tmp", "tuning.json.tmp", "block-00001.json.tmp"]
)
def test_what_a_killed_run_was_writing_goes(source: Path, tmp_path: Path, name: str) -> None:
    partial = stopped_after(source, tmp_path / "out", recipe("rtn"), 1)
    (partial / name).write_bytes(b"half")
    write(source, tmp_path / "out", recipe("rtn"), resume=True)
    write(source, tmp_path / "straight", recipe("rtn"))
    assert without_run(digests(tmp_path / "out")) == without_run(digests(tmp_path / "straight"))


@pytest.mark.parametrize(("name", "damage"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_block_is_done_again(
    source: Path, tmp_path: Path, quantized_blocks: list[int], name: str, damage: Callable[[Path], object]
) -> None:
    damage(stopped_after(source, tmp_path / "out", DUQUANT, 2) / name)
    quantized_blocks.clear()
    write(source, tmp_path / "out", DUQUANT, resume=True)
    assert quantized_blocks == [0]
    write(source, tmp_path / "straight", DUQUANT)
    assert without_run(digests(tmp_path / "out")) == without_run(digests(tmp_path / "straight"))


def test_a_partial_of_another_run_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    partial = stopped_after(source, output, DUQUANT, 1)
    before = digests(partial)
    other = write_tiny_model(tmp_path / "other", seed=1)

    def refused(differs: str, model: Path = source, chosen: Recipe = DUQUANT, **options: object) -> None:
        message = rf"belongs to a run with another {differs}; give another output, or start over with --force and"
        with pytest.raises(CheckpointError, match=message):
            write(model, output, chosen, resume=True, **options)
        assert digests(partial) == before and not output.exists()

    refused(r"model \(model.safetensors\)", model=other)
    refused("recipe", chosen=DUQUANT.changed({"smoothing.alpha": 0.5}))
    refused("seed", seed=1)
    refused("windows", windows=random_windows(6, 24, seed=9))
    refused("recipe, seed", chosen=recipe("duquant++", transform__steps=5), seed=1)
    refused("recipe, windows", chosen=recipe("rtn"))
    with monkeypatch.context() as patched:
        patched.setattr(fingerprint, "versions", lambda: versions() | {"torch": "1.0"})
        refused(r"versions \(torch\)")
    with monkeypatch.context() as patched:
        patched.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
        refused(r"kernels \(instructions\)")
    write(source, output, DUQUANT, resume=True)


@pytest.mark.parametrize("content", ["", "[]", "{", "{}"])
def test_a_damaged_fingerprint_is_said(source: Path, tmp_path: Path, quantized_blocks: list[int], content: str) -> None:
    partial = stopped_after(source, tmp_path / "out", DUQUANT, 1)
    (partial / "fingerprint.json").write_text(content)
    before = digests(partial)
    for force in (False, True):
        with pytest.raises(
            CheckpointError, match=r"fingerprint.json: is damaged and .* start over with --force and without"
        ):
            write(source, tmp_path / "out", DUQUANT, resume=True, force=force)
    assert digests(partial) == before
    quantized_blocks.clear()
    write(source, tmp_path / "out", DUQUANT, force=True)
    assert quantized_blocks == [0, 1] and not partial.exists()


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"force": True}])
def test_a_partial_without_a_fingerprint_is_never_touched(
    source: Path, tmp_path: Path, options: dict[str, bool]
) -> None:
    partial = stopped_after(source, tmp_path / "out", DUQUANT, 1)
    (partial / "fingerprint.json").unlink()
    before = digests(partial)
    with pytest.raises(CheckpointError, match=r"out.partial: is needed to work in, and has no fingerprint.json"):
        write(source, tmp_path / "out", DUQUANT, **options)
    assert digests(partial) == before and not (tmp_path / "out").exists()


def test_a_file_of_somebody_else_in_a_partial_stays(source: Path, tmp_path: Path) -> None:
    partial = stopped_after(source, tmp_path / "out", DUQUANT, 1)
    (partial / "notes.txt").write_text("mine")
    for options in ({}, {"resume": True}, {"force": True}):
        with pytest.raises(CheckpointError, match=r"holds 'notes.txt', which is not from a run of mxrot; move it away"):
            write(source, tmp_path / "out", DUQUANT, **options)
    assert (partial / "notes.txt").read_text() == "mine"


def test_work_is_thrown_away_with_force_only(source: Path, tmp_path: Path, quantized_blocks: list[int]) -> None:
    partial = stopped_after(source, tmp_path / "out", DUQUANT, 1)
    with pytest.raises(
        CheckpointError, match="holds 1 finished block of an earlier run; continue with --resume, or start"
    ):
        write(source, tmp_path / "out", DUQUANT, seed=1)
    assert (partial / "block-00000.json").is_file()
    quantized_blocks.clear()
    write(source, tmp_path / "out", DUQUANT, seed=1, force=True)
    assert quantized_blocks == [0, 1] and not partial.exists()


def test_a_finished_run_is_not_done_again(source: Path, tmp_path: Path, quantized_blocks: list[int]) -> None:
    first = write(source, tmp_path / "out", DUQUANT)
    before = digests(tmp_path / "out")
    quantized_blocks.clear()
    again = write(source, tmp_path / "out", DUQUANT, resume=True)
    assert again == json.loads(json.dumps(first)) and quantized_blocks == []
    assert digests(tmp_path / "out") == before


def test_a_finished_run_of_another_kind_is_not_taken_for_this_one(source: Path, tmp_path: Path) -> None:
    write(source, tmp_path / "out", DUQUANT)
    before = digests(tmp_path / "out")
    with pytest.raises(CheckpointError, match="out: was made by a run with another seed; use --force to replace it"):
        write(source, tmp_path / "out", DUQUANT, seed=1, resume=True)
    assert digests(tmp_path / "out") == before


def test_a_finished_run_that_lost_a_shard_is_not_finished(
    source: Path, tmp_path: Path, quantized_blocks: list[int]
) -> None:
    write(source, tmp_path / "out", DUQUANT)
    (tmp_path / "out" / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=f"{SHARDS[1]}: is missing; use --force to make it again"):
        write(source, tmp_path / "out", DUQUANT, resume=True)
    write(source, tmp_path / "out", DUQUANT, resume=True, force=True)
    load(tmp_path / "out", verify=True)
