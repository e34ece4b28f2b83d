"""Tensors straight from safetensors files, one by one, and nothing from any other kind of file."""

import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_model import write_tiny_model
from transformers import LlamaForCausalLM

from mxrot.errors import FamilyError, NumericsError
from mxrot.models import WeightFiles

NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny")


@pytest.fixture
def sharded(folder: Path, tmp_path: Path) -> Path:
    """The same model in several files with an index."""
    model = LlamaForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def change(folder: Path, name: str, value: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_single_file_and_shards_give_the_same(folder: Path, sharded: Path) -> None:
    single, several = WeightFiles(folder), WeightFiles(sharded)
    assert single.names == several.names and len(several.files) > 2
    assert single.files == [folder / "model.safetensors"]
    expected = load_file(folder / "model.safetensors")
    assert single.names == sorted(expected)
    for name, value in expected.items():
        assert torch.equal(single.read(name), value) and torch.equal(several.read(name), value)
        assert single.dtype_of(name) == several.dtype_of(name) == torch.float16
        assert name in single and name in several
    assert "no.such.tensor" not in single


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_damaged_numbers_name_tensor_and_file(folder: Path, bad: float) -> None:
    norm = torch.ones(64, dtype=torch.float16)
    norm[7] = bad
    change(folder, NORM, norm)
    with pytest.raises(
        NumericsError, match=f"{NORM}: the weights hold NaN or Inf; the file model.safetensors is damaged"
    ):
        WeightFiles(folder).read(NORM)


def test_a_missing_tensor(folder: Path) -> None:
    for call in (WeightFiles(folder).read, WeightFiles(folder).dtype_of):
        with pytest.raises(FamilyError, match=r"no tensor 'a\.b' in its safetensors files; is the download complete\?"):
            call("a.b")


def test_a_tensor_of_another_kind(folder: Path) -> None:
    change(folder, NORM, torch.ones(64, dtype=torch.int64))
    with pytest.raises(FamilyError, match=f"{NORM}: stored as I64; expected one of F16, BF16, F32, F64"):
        WeightFiles(folder).dtype_of(NORM)


def test_a_missing_shard_is_found_before_anything_is_read(sharded: Path) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(FamilyError, match=f"{re.escape(str(gone))}: is named in .* and missing; is the download"):
        WeightFiles(sharded)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": null}'])
def test_a_broken_index(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(FamilyError, match=r"index\.json: (not JSON|expected a JSON object|not a safetensors index)"):
        WeightFiles(sharded)


def test_an_index_leads_to_no_file_outside(folder: Path, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    for outside in ("../tiny/model.safetensors", str(folder / "model.safetensors"), "C:\\model.safetensors"):
        index = {"weight_map": {NORM: outside}}
        (inner / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(FamilyError, match=r"index\.json: names .*; expected a safetensors file in its folder"):
            WeightFiles(inner)


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 64, pickle.dumps({"a": 1})])
def test_a_file_that_is_not_safetensors(folder: Path, content: bytes) -> None:
    files = WeightFiles(folder)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(FamilyError, match=r"model\.safetensors: cannot be read as safetensors"):
        WeightFiles(folder)
    with pytest.raises(FamilyError, match=r"model\.safetensors: cannot be read as safetensors"):
        files.read(NORM)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_named_and_not_opened(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(FamilyError, match=f"{name} would have to be unpickled, which mxrot never does"):
        WeightFiles(folder)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(
        FamilyError, match=r"no model\.safetensors and no model\.safetensors\.index\.json; it is empty$"
    ):
        WeightFiles(tmp_path)


def test_inverse_frequencies_of_old_conversions_are_passed_over(folder: Path) -> None:
    """Llama 2's files hold them for each block; transformers ignores them too."""
    before = WeightFiles(folder).names
    change(folder, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.full((8,), torch.nan))
    assert WeightFiles(folder).names == before


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no such call on this system")
def test_the_next_tensors_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The places told to the system hold these tensors and no others."""
    tensors = {f"blocks.{index}.{name}": torch.randn(3, index + 2) for index in range(3) for name in "ab"}
    save_file(tensors, tmp_path / "model.safetensors")
    told: list[bytes] = []
    content = (tmp_path / "model.safetensors").read_bytes()
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, size, advice: told.append(content[start : start + size]))
    files = WeightFiles(tmp_path)
    files.will_need("blocks.1")
    assert told == [tensors[f"blocks.1.{name}"].numpy().tobytes() for name in "ab"]
    files.will_need("blocks.3")
    assert len(told) == 2
