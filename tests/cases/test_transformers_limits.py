"""What docs/transformers.md says does not work: each ends with an error, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.cases.commands import IDS
from tests.cases.transformers_models import from_pretrained, loaded, outputs, write_checkpoint
from torch import nn
from transformers import Trainer, TrainingArguments


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("limits") / "out")


@pytest.mark.case("C6")
def test_transformers_does_not_halve_what_it_has_loaded(folder: Path) -> None:
    model = from_pretrained(folder)
    with pytest.raises(ValueError, match="not supported for quantized model"):
        model.half()
    expected = outputs(from_pretrained(folder, dtype=torch.bfloat16))
    codes = model.model.layers[0].mlp.up_proj.weight_packed.clone()
    model.to(torch.bfloat16)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight_packed, codes)
    model.model.rotary_emb.inv_freq = from_pretrained(folder).model.rotary_emb.inv_freq  # the cast rounds it
    assert torch.equal(outputs(model), expected)


@pytest.mark.case("C1")
def test_whole_numbers_take_no_gradient(folder: Path) -> None:
    model = loaded(folder)
    with pytest.raises(RuntimeError, match="floating point"):
        model.requires_grad_(True)
    model.get_output_embeddings().requires_grad_(True)
    model(IDS).logits.sum().backward()
    assert model.get_output_embeddings().weight.grad is not None


@pytest.mark.case("C1")
def test_the_trainer_refuses_it(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantized"):
        Trainer(from_pretrained(folder), TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))


@pytest.mark.case("C1")
def test_it_is_no_ordinary_linear_and_does_not_become_one(folder: Path) -> None:
    model = from_pretrained(folder)
    assert not isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
    with pytest.raises(NotImplementedError, match="dequantize"):
        model.dequantize()


@pytest.mark.case("C1")
def test_a_part_is_exported(folder: Path) -> None:
    part = loaded(folder).model.layers[0].mlp
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    exported = torch.export.export(part, (x,)).module()
    with torch.no_grad():
        assert torch.equal(exported(x), part(x))
