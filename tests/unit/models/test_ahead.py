"""Folders with tensors that predict tokens further ahead, beside the same models without them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cases.commands import mxrot
from tests.contracts.test_families import TINY_FAMILIES
from tests.contracts.tiny_configs import config_of
from tests.tiny_model import write_tokenizer
from tests.unit.checkpoint.folders import all_tensors, recipe, write
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import mxrot as package
from mxrot.errors import FamilyError
from mxrot.models import FAMILIES, FolderSource
from mxrot.models.ahead import Ahead

IDS = torch.randint(3, 50, (2, 24), generator=torch.Generator().manual_seed(1))
SAID = "passed over, as transformers and vLLM do: "
FAMILIES_AHEAD = ("glm4_moe", "deepseek_v3")
each = pytest.mark.parametrize("name", FAMILIES_AHEAD)


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def two_folders(name: str, tmp_path: Path) -> tuple[Path, Path, int]:
    """A model with a decoder block behind its two, the same without, and of how many tensors that block is."""
    more, plain = tmp_path / "more", tmp_path / "plain"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(TINY_FAMILIES[name], num_hidden_layers=3)).half()
    for folder in (more, plain):
        model.save_pretrained(folder)
        write_tokenizer(folder)
        change_config(folder, num_hidden_layers=2, num_nextn_predict_layers=1)
    tensors = load_file(more / "model.safetensors")
    own = {name for name in tensors if name.startswith("model.layers.2.")}
    save_file({n: x for n, x in tensors.items() if n not in own}, plain / "model.safetensors", {"format": "pt"})
    odd = {f"model.layers.2.{part}.weight": torch.ones(64).half() for part in ("enorm", "shared_head.norm")}
    save_file(tensors | odd, more / "model.safetensors", {"format": "pt"})
    return more, plain, len(own) + 2


@each
def test_a_block_behind_the_last_is_passed_over(tmp_path: Path, name: str) -> None:
    """What is written is that of the folder without it, bit for bit, and is what transformers makes of both."""
    more, plain, count = two_folders(name, tmp_path)
    said = f"{SAID}{count} tensors that predict tokens further ahead (model.layers.2)"
    runs = [write(folder, tmp_path / f"q-{folder.name}", recipe("rtn")) for folder in (more, plain)]
    assert [run.get("passed_over") for run in runs] == [said, None]
    written = [all_tensors(tmp_path / f"q-{folder.name}") for folder in (more, plain)]
    assert written[0].keys() == written[1].keys() and not [n for n in written[0] if n.startswith("model.layers.2.")]
    assert all(torch.equal(x, written[1][n]) for n, x in written[0].items())
    loaded = package.load(tmp_path / "q-more", device="cpu")
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "q-more", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, by_transformers(IDS).logits)


@each
def test_the_original_is_what_transformers_makes_of_it(tmp_path: Path, name: str) -> None:
    more, _, _ = two_folders(name, tmp_path)
    from mxrot.opening import open_model

    opened, _ = open_model(more, "cpu")
    theirs = AutoModelForCausalLM.from_pretrained(more, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(opened(IDS).logits, theirs(IDS).logits)


def test_plan_and_quantize_say_so_in_one_line(tmp_path: Path) -> None:
    more, plain, count = two_folders("glm4_moe", tmp_path)
    line = f"{SAID}{count} tensors"
    quantized = mxrot("quantize", more, "-r", "rtn", "-o", tmp_path / "out", "--device", "cpu")
    planned = [mxrot("plan", folder, "-r", "rtn", "--device", "cpu") for folder in (more, plain)]
    assert quantized.exit_code == 0, quantized.output
    assert [" ".join(each.stdout.split()).count(line) for each in (quantized, *planned)] == [1, 1, 0]


def test_transformers_may_quantize_such_a_folder(tmp_path: Path) -> None:
    more, plain, _ = two_folders("glm4_moe", tmp_path)
    found = [
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=package.MxrotConfig("rtn"))
        for folder in (more, plain)
    ]
    with torch.no_grad():
        assert torch.equal(found[0](IDS).logits, found[1](IDS).logits)


@pytest.mark.parametrize("ahead", [0, None, "1", -1, True, 10**9])
def test_a_block_that_the_config_does_not_count_is_refused(tmp_path: Path, ahead: object) -> None:
    more, _, _ = two_folders("glm4_moe", tmp_path)
    change_config(more, num_nextn_predict_layers=ahead)
    if ahead == 10**9:
        assert not Ahead.of(FAMILIES["glm4_moe"], AutoConfig.from_pretrained(more)).numbers
    with pytest.raises(FamilyError, match=r"num_hidden_layers 2, and the files hold 3 decoder blocks"):
        FolderSource(more)


def test_only_as_many_blocks_as_it_counts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = config_of(TINY_FAMILIES["glm4_moe"], num_hidden_layers=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    change_config(tmp_path, num_hidden_layers=2, num_nextn_predict_layers=1)
    with pytest.raises(FamilyError, match=r"num_hidden_layers 2, and the files hold 3 decoder blocks"):
        FolderSource(tmp_path)


def named(name: str, tmp_path: Path, extra: dict[str, Tensor]) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_of(TINY_FAMILIES[name])).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | extra, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


def test_names_that_the_class_passes_over(tmp_path: Path) -> None:
    """Of ERNIE 4.5 with experts: those of `mtp`. A Llama has none."""
    extra = {f"model.mtp_block.0.{part}.weight": torch.ones(4) for part in ("mlp.down_proj", "input_layernorm")}
    found = FolderSource(named("ernie4_5_moe", tmp_path / "ernie", extra))
    assert found.passed_over == f"{SAID}2 tensors that predict tokens further ahead (model.mtp_block)"
    assert not [name for name in found.files.names if "mtp" in name]
    llama = FolderSource(named("llama", tmp_path / "llama", extra))
    assert not llama.passed_over and sum("mtp" in name for name in llama.files.names) == 2


def test_transformers_does_not_load_what_is_passed_over() -> None:
    """By the class of each family of which tensors are passed over by name."""
    import transformers

    for family in FAMILIES.values():
        config = config_of(TINY_FAMILIES[family.name])
        for architecture in family.architectures:
            patterns = getattr(transformers, architecture)._keys_to_ignore_on_load_unexpected or ()
            for pattern in Ahead.of(family, config).patterns:
                assert pattern in patterns and re.compile(pattern)
    assert {name for name, family in FAMILIES.items() if Ahead.of(family, config_of(family)).patterns} >= {
        "ernie4_5_moe"
    }
