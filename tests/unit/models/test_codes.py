"""Folders that hold codes, beside the same models in bfloat16."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.contracts.test_families import TINY_FAMILIES, spread_gains
from tests.contracts.tiny_configs import config_of
from tests.tiny_model import write_tokenizer
from tests.unit.checkpoint.folders import recipe, write
from torch import Tensor
from transformers import AutoModelForCausalLM

import mxrot
from mxrot.errors import FamilyError, MxrotError, NumericsError
from mxrot.formats.given_codes import from_mxfp4, from_tiles
from mxrot.models import FolderSource
from mxrot.opening import check_original, open_model

IDS = torch.randint(3, 50, (2, 24), generator=torch.Generator().manual_seed(1))
METHODS = {
    "gpt_oss": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "deepseek_v3": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 32]},
}
each = pytest.mark.parametrize("family", METHODS)


def codes_for(family: str, name: str, weight: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Random codes in the place of a weight, by their names, and the weight that they are; none where it has none."""
    if family == "gpt_oss" and re.search(r"experts\.\w+_proj$", name):
        count, inputs, rows = weight.shape
        blocks = torch.randint(0, 256, (count, rows, inputs // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(117, 122, (count, rows, inputs // 32), generator=generator, dtype=torch.uint8)
        exact = from_mxfp4(blocks, scales, torch.bfloat16).mT.contiguous()
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}, exact
    if family == "deepseek_v3" and name.endswith("_proj.weight"):
        codes = (weight.float() * 512).to(torch.float8_e4m3fn)
        shape = [-(-codes.shape[0] // 16), -(-codes.shape[1] // 32)]
        factors = torch.rand(shape, generator=generator) / 512
        return {name: codes, f"{name}_scale_inv": factors}, from_tiles(codes, factors, 16, 32, torch.bfloat16)
    return {}, weight


def two_folders(family: str, tmp_path: Path) -> tuple[Path, Path]:
    """A model in codes, and the same in bfloat16."""
    coded, plain = tmp_path / "coded", tmp_path / "plain"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(TINY_FAMILIES[family]))
    spread_gains(model, TINY_FAMILIES[family])
    for folder in (coded, plain):
        model.bfloat16().save_pretrained(folder)
        write_tokenizer(folder)
    generator = torch.Generator().manual_seed(0)
    tensors, replaced = load_file(plain / "model.safetensors"), {}
    for name in sorted(tensors):
        own, tensors[name] = codes_for(family, name, tensors[name], generator)
        replaced |= own or {name: tensors[name]}
    assert len(replaced) > len(tensors)
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    save_file(replaced, coded / "model.safetensors", {"format": "pt"})
    config = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps(config | {"quantization_config": METHODS[family]}))
    return coded, plain


def everything(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    return {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


@each
def test_every_tensor_is_that_of_the_model_in_bfloat16(family: str, tmp_path: Path) -> None:
    one, other = (FolderSource(folder) for folder in two_folders(family, tmp_path))
    assert one.dtype == other.dtype == torch.bfloat16 and one.types == other.types
    assert one.files.names == other.files.names
    for found, expected in ((one.outer(), other.outer()), *((one.block(i), other.block(i)) for i in range(2))):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert one.changes and not other.changes


@each
def test_checkpoints_of_both_are_one(family: str, tmp_path: Path) -> None:
    """Codes and all; config.json says nothing of those before, and run.json does."""
    coded, plain = two_folders(family, tmp_path)
    for folder, out in ((coded, tmp_path / "one"), (plain, tmp_path / "other")):
        write(folder, out, recipe("rtn"), windows=None)
    one, other = (everything(tmp_path / out) for out in ("one", "other"))
    assert one and one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other)
    configs = [json.loads((tmp_path / out / "config.json").read_text()) for out in ("one", "other")]
    assert configs[0] == configs[1]
    assert json.loads((tmp_path / "one" / "run.json").read_text())["changes"] == list(FolderSource(coded).changes)
    loaded = mxrot.load(tmp_path / "one", device="cpu")
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float32)
    assert torch.equal(loaded(IDS).logits, by_transformers(IDS).logits)


@each
def test_it_opens_as_the_model_in_bfloat16(family: str, tmp_path: Path) -> None:
    coded, plain = two_folders(family, tmp_path)
    check_original(coded, "here")
    one, other = (open_model(folder, "cpu")[0] for folder in (coded, plain))
    with torch.no_grad():
        assert torch.equal(one(IDS).logits, other(IDS).logits)


@each
@pytest.mark.parametrize("damage", ["no codes", "shape", "not finite"])
def test_codes_that_do_not_fit_are_named(family: str, damage: str, tmp_path: Path) -> None:
    coded, _ = two_folders(family, tmp_path)
    path = coded / "model.safetensors"
    tensors = load_file(path)
    ends = ("_scales", ".weight_scale_inv")
    scales = next(name for name in sorted(tensors) if name.startswith("model.layers.1.") and name.endswith(ends))
    if damage == "no codes":
        del tensors[scales.replace("_scales", "_blocks").removesuffix("_scale_inv")]
    elif damage == "shape":
        tensors[scales] = tensors[scales][:-1].contiguous()
    else:
        tensors[scales].flatten()[0] = 255 if family == "gpt_oss" else 3e38
    save_file(tensors, path, {"format": "pt"})
    kind: type[MxrotError] = NumericsError if damage == "not finite" else FamilyError
    with pytest.raises(kind, match=re.escape(scales.removesuffix("_scales").removesuffix("_scale_inv"))):
        FolderSource(coded).block(1)


@pytest.mark.parametrize(
    "changes", [{"weight_block_size": None}, {"fmt": "e5m2"}, {"weight_block_size": [16]}], ids=str
)
def test_other_codes_are_refused(changes: dict[str, object], tmp_path: Path) -> None:
    coded, _ = two_folders("deepseek_v3", tmp_path)
    config = json.loads((coded / "config.json").read_text())
    config["quantization_config"] |= changes
    (coded / "config.json").write_text(json.dumps(config))
    with pytest.raises(FamilyError, match="is quantized already"):
        check_original(coded, "here")
