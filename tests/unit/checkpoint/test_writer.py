"""What a run leaves on disk: when it ends well, when it fails, and when it is stopped."""

import errno
import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_model import write_tiny_model
from tests.unit.checkpoint.folders import WINDOWS, all_tensors, digests, recipe, without_run, write

from mxrot.checkpoint import check_output, files, load, placing, side_files
from mxrot.errors import CheckpointError, ConfigError, DiskFullError, NumericsError, notes_of

needs_dev_full = pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full on this system")
RTN = recipe("rtn")


def beside(output: Path) -> list[str]:
    """What stands beside the output and in it but should not."""
    left = [path.name for path in output.parent.iterdir() if path.name.startswith(output.name + ".")]
    return left + [path.name for path in output.parent.rglob("*.tmp")]


def stop_at(block: int, error: BaseException) -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, what: str) -> None:
        if done == block:
            raise error

    return progress


@pytest.fixture
def watched_writes(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int, Path], None]], None]:
    """Calls a function with number and path of each file before it is written."""
    original = files.whole_file

    def watch(see: Callable[[int, Path], None]) -> None:
        numbers = itertools.count()

        @contextmanager
        def whole_file(path: Path, size: int) -> Iterator[files.Sink]:
            see(next(numbers), path)
            with original(path, size) as sink:
                yield sink

        for room in (files, side_files):
            monkeypatch.setattr(room, "whole_file", whole_file)

    return watch


def test_the_folder_holds_what_it_should(source: Path, tmp_path: Path) -> None:
    run = write(source, tmp_path / "out", recipe("duquant++"), data={"text": "some"})
    names = {path.name for path in (tmp_path / "out").iterdir()}
    shards = {f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)}
    texts = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "recipe.toml"}
    assert names == shards | texts | {"model.safetensors.index.json", "run.json", "README.md"}
    assert json.loads((tmp_path / "out" / "run.json").read_text()) == json.loads(json.dumps(run))
    assert set(run["files"]) == names - {"run.json"}
    found = digests(tmp_path / "out")
    assert {name: entry["sha256"] for name, entry in run["files"].items()} == without_run(found)
    assert run["data"] == {"text": "some"} and run["windows"] == tuple(WINDOWS.shape) and run["seed"] == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = all_tensors(tmp_path / "out")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    assert beside(tmp_path / "out") == []


@pytest.mark.parametrize("name", ["rtn", "hadamard", "duquant++", "duquant++-gptq"])
def test_same_seed_same_bytes(source: Path, tmp_path: Path, name: str) -> None:
    write(source, tmp_path / "one", recipe(name), seed=3)
    torch.manual_seed(12345)  # the global generator has no say
    write(source, tmp_path / "two", recipe(name), seed=3)
    assert without_run(digests(tmp_path / "one")) == without_run(digests(tmp_path / "two"))


def test_another_seed_other_bytes(source: Path, tmp_path: Path) -> None:
    write(source, tmp_path / "one", recipe("duquant++"), seed=0)
    write(source, tmp_path / "two", recipe("duquant++"), seed=1)
    one, two = digests(tmp_path / "one"), digests(tmp_path / "two")
    for number in (2, 3):
        assert one[f"model-0000{number}-of-00003.safetensors"] != two[f"model-0000{number}-of-00003.safetensors"]
    assert one["model-00001-of-00003.safetensors"] == two["model-00001-of-00003.safetensors"]


def test_an_output_that_is_not_empty_is_refused(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="out: exists and is not empty; use --force"):
        write(source, output, RTN)
    assert digests(output).keys() == {"mine.txt"} and beside(output) == []


def test_an_empty_output_folder_is_taken(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(source, tmp_path / "out", RTN)
    load(tmp_path / "out")


def test_folders_above_the_output_are_made(source: Path, tmp_path: Path) -> None:
    write(source, tmp_path / "a" / "b" / "out", RTN)
    load(tmp_path / "a" / "b" / "out")


def test_force_replaces_at_the_end_only(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("old")

    def progress(done: int, total: int, what: str) -> None:
        assert (output / "mine.txt").read_text() == "old"

    write(source, output, RTN, force=True, progress=progress)
    assert not (output / "mine.txt").exists() and beside(output) == []
    load(output)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_after_a_failing_rename_both_are_there(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("old")
    original = Path.rename

    def fail(self: Path, target: Path) -> Any:
        if self.name == "out.partial":
            raise OSError(errno.EIO, "Input/output error", str(self))
        return original(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", fail)
        patched.setattr(placing, "exchange", fail if can_exchange else lambda one, other: False)
        with pytest.raises(OSError, match="Input/output error"):
            write(source, output, RTN, force=True)
    assert (output / "mine.txt").read_text() == "old" and beside(output) == ["out.partial"]
    write(source, output, RTN, force=True, resume=True)
    assert load(output) is not None and beside(output) == []


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_no_output(source: Path, tmp_path: Path, force: bool) -> None:
    (tmp_path / "out").write_text("a file")
    for output in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(CheckpointError, match=r"out: is a file; give a folder$"):
            write(source, output, RTN, force=force)
    assert (tmp_path / "out").read_text() == "a file"


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_an_output_without_a_name_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="has no name of its own"):
        check_output(Path(name), force=True)


def test_the_model_itself_is_never_replaced(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "models" / "tiny")
    before = digests(source)
    for output in (source, source.parent):
        with pytest.raises(CheckpointError, match="holds the model that is to be quantized"):
            write(source, output, RTN, force=True)
    assert digests(source) == before


def test_what_cannot_be_exported_is_refused_first(source: Path, tmp_path: Path) -> None:
    for chosen, message in (
        (recipe("rtn", weights__rule="log256"), "8-bit levels"),
        (recipe("duquant++-released"), "cannot be exported"),
    ):
        with pytest.raises(ConfigError, match=message):
            write(source, tmp_path / "out", chosen)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "error", [NumericsError("bad layer"), RuntimeError("CUDA out of memory"), OSError(errno.EIO, "Input/output error")]
)
def test_after_an_error_finished_blocks_stay(source: Path, tmp_path: Path, error: Exception, resume: bool) -> None:
    output = tmp_path / "out"
    with pytest.raises(type(error)) as raised:
        write(source, output, RTN, resume=resume, progress=stop_at(1, copy(error)))
    assert not output.exists() and beside(output) == ["out.partial"]
    said = f"finished blocks are kept in {output}.partial; the same command with --resume continues from there"
    assert notes_of(raised.value) == [said]


def test_after_an_error_before_the_first_block_nothing_is_left(source: Path, tmp_path: Path) -> None:
    with pytest.raises(NumericsError) as raised:
        write(source, tmp_path / "out", RTN, progress=stop_at(0, NumericsError("bad layer")))
    assert list(tmp_path.iterdir()) == [] and notes_of(raised.value) == []


@pytest.mark.parametrize("block", [0, 1, 2])
def test_an_interrupt_keeps_finished_blocks(source: Path, tmp_path: Path, block: int) -> None:
    """Whether or not `resume` was asked for; a partial folder without a finished block is worth nothing."""
    output, chosen = tmp_path / "out", recipe("duquant++")
    with pytest.raises(KeyboardInterrupt):
        write(source, output, chosen, progress=stop_at(block, KeyboardInterrupt()))
    assert not output.exists()
    assert beside(output) == (["out.partial"] if block else [])
    assert len(list((tmp_path / "out.partial").glob("block-*.json"))) == block
    write(source, output, chosen, resume=True)
    write(source, tmp_path / "straight", chosen)
    assert without_run(digests(output)) == without_run(digests(tmp_path / "straight"))


def test_an_interrupt_inside_of_a_write_leaves_no_temporary_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(self: Path, target: Path) -> Path:
        if "00003-of" in self.name:
            raise KeyboardInterrupt
        self.rename(target)
        return target

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        write(source, tmp_path / "out", RTN)
    assert beside(tmp_path / "out") == ["out.partial"]


@needs_dev_full
@pytest.mark.parametrize("resume", [False, True])
def test_a_full_disk_at_each_file(
    source: Path, tmp_path: Path, watched_writes: Callable[..., None], resume: bool
) -> None:
    """Real: the temporary file is a link to /dev/full, which takes no byte."""
    output = tmp_path / "out"
    write(source, output, recipe("hadamard"))
    old = digests(output)
    names: list[str] = []
    watched_writes(lambda number, path: names.append(path.name))
    write(source, tmp_path / "straight", RTN)
    assert len(names) == 15 and len(set(names)) == 15
    for full in range(len(names)):

        def fill_disk(number: int, path: Path, full: int = full) -> None:
            if number == full:
                path.with_name(path.name + ".tmp").symlink_to("/dev/full")

        watched_writes(fill_disk)
        with pytest.raises(DiskFullError, match=rf"{names[full]}: no space left on the device for [\d.]+ (MB|bytes)"):
            write(source, output, RTN, force=True, resume=resume)
        assert digests(output) == old
        is_at_work = any(name.startswith("block-") for name in names[:full])
        assert beside(output) == (["out.partial"] if is_at_work else [])
        watched_writes(lambda number, path: None)
        write(source, output, RTN, force=True, resume=True)
        assert without_run(digests(output)) == without_run(digests(tmp_path / "straight"))
        assert beside(output) == []
        write(source, output, recipe("hadamard"), force=True)
        old = digests(output)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_no_space_for_the_name_of_a_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def replace(self: Path, target: Any) -> Path:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(DiskFullError) as raised:
        write(source, tmp_path / "out", RTN)
    assert raised.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_the_record_says_what_was_done(source: Path, tmp_path: Path) -> None:
    chosen = recipe("duquant++-gptq")
    run = write(source, tmp_path / "out", chosen, seed=5)
    assert run["recipe"] == chosen.to_toml() == (tmp_path / "out" / "recipe.toml").read_text()
    assert run["device"] == "cpu" and run["versions"]["torch"] == torch.__version__
    assert [block["index"] for block in run["blocks"]] == [0, 1]
    linears = [linear for block in run["blocks"] for linear in block["linears"]]
    assert len(linears) == 14
    assert all(x["damping"] > 0 and 0 < x["weight_error"] < 1 and 0 < x["output_error"] < 1 for x in linears)
    assert run["size"]["bits_per_weight"] == 4.25


def test_the_card_says_how_to_load_it(source: Path, tmp_path: Path) -> None:
    write(source, tmp_path / "out", recipe("duquant++"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\nimport mxrot\n" in card.split("## What it is")[0] and "Without mxrot nothing loads it" in card
    assert "mxrot.load(" in card
    assert "4.250" in card
    write(source, tmp_path / "plain", RTN)
    assert "nothing loads it" not in (tmp_path / "plain" / "README.md").read_text()
