"""Copies of a model, and models that move between devices and types: C6 and C7."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cases.transformers_models import from_pretrained, loaded, outputs, write_checkpoint
from torch import Tensor, nn
from transformers import PreTrainedModel

import mxrot
from mxrot.formats import FORMATS
from mxrot.layers import prepare_linears, sites_of
from mxrot.recipe import load_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("copies") / "out")


@pytest.fixture(scope="module")
def expected(folder: Path) -> Tensor:
    return outputs(loaded(folder))


def memory(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; what lies in the same storage counts once."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def assert_prepared(model: nn.Module) -> None:
    """Every site of several linears has its weights in one tensor."""
    whole = [linears for linears in sites_of(model) if len(linears) > 1]
    assert whole
    for linears in whole:
        codes = linears[0].whole_codes
        assert codes is not None
        place = codes.untyped_storage().data_ptr()
        assert all(linear.weight_packed.untyped_storage().data_ptr() == place for linear in linears)


def through_pickle(model: PreTrainedModel) -> PreTrainedModel:
    copied: PreTrainedModel = pickle.loads(pickle.dumps(model))
    return copied


def through_torch(model: PreTrainedModel) -> PreTrainedModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copied: PreTrainedModel = torch.load(file, weights_only=False)
    return copied


@pytest.mark.case("C7")
@pytest.mark.parametrize("make", [loaded, from_pretrained])
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch], ids=lambda copied: copied.__name__)
def test_a_copy_is_the_same_model(
    folder: Path, expected: Tensor, make: Callable[[Path], PreTrainedModel], copied: Callable[..., PreTrainedModel]
) -> None:
    model = make(folder)
    outputs(model)  # fills what is kept between calls
    other = copied(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(outputs(other), expected)


@pytest.mark.case("C7")
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch], ids=lambda copied: copied.__name__)
def test_a_copy_of_a_prepared_model_is_prepared_and_as_small(
    folder: Path, expected: Tensor, copied: Callable[..., PreTrainedModel]
) -> None:
    model = loaded(folder, is_prepared=True)
    outputs(model)
    other = copied(model)
    assert_prepared(other)
    assert memory(other) == memory(model)
    mine, others = (next(iter(sites_of(which)))[0] for which in (model, other))
    assert others.site is not mine.site and others.whole_codes is not mine.whole_codes
    assert torch.equal(outputs(other), expected)


@pytest.mark.case("C7")
def test_a_copy_while_products_wait(folder: Path) -> None:
    """Between q and k: what waits belongs to the original."""
    attention = loaded(folder, is_prepared=True).model.layers[0].self_attn
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        attention.q_proj(x)
        other = through_torch(attention)
        assert torch.equal(other.k_proj(x), attention.k_proj(x))


@pytest.mark.case("C7")
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_formats_and_all_their_rules_can_be_pickled(format: Any) -> None:
    for rule in map(format.rule, format.rules):
        assert pickle.loads(pickle.dumps((format, rule))) == (format, rule)


@pytest.mark.case("C7")
def test_a_state_dict_goes_around(folder: Path, tmp_path: Path, expected: Tensor) -> None:
    model, other = (loaded(folder, is_prepared=True) for _ in range(2))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    for parameter in other.parameters():
        parameter.data.zero_()
    found = other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    assert not found.missing_keys and not found.unexpected_keys
    assert torch.equal(outputs(other), expected)


def move_through_meta(model: PreTrainedModel) -> None:
    """To a device without values, and back with them."""
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    inverse_frequencies = model.model.rotary_emb.inv_freq.clone()
    model.model.layers.to("meta")
    assert all(
        linear.whole_codes is None and linear.lifted is None for linears in sites_of(model) for linear in linears
    )
    model.model.layers.to_empty(device="cpu")
    model.load_state_dict(kept, strict=True)
    assert torch.equal(model.model.rotary_emb.inv_freq, inverse_frequencies)


MOVES: dict[str, Callable[[PreTrainedModel], object]] = {
    "to a type and back": lambda model: model.to(torch.float64).to(torch.float32),
    "cpu().float()": lambda model: model.cpu().float(),
    "one block": lambda model: model.model.layers[1].double().float(),
    "type()": lambda model: model.type(torch.float64).type(torch.float32),
    "cloned": lambda model: model._apply(torch.clone),
    "shared with processes": lambda model: model.share_memory(),
    "train and eval": lambda model: model.train().eval(),
    "requires_grad_": lambda model: model.requires_grad_(False),
    "tie_weights": lambda model: model.tie_weights(),
}


@pytest.mark.case("C6")
@pytest.mark.parametrize("is_prepared", [False, True])
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_a_model_that_moves_is_the_same_and_as_large(
    folder: Path, expected: Tensor, move: Callable[[PreTrainedModel], object], is_prepared: bool
) -> None:
    model = loaded(folder, is_prepared)
    before = memory(model)
    move(model)
    assert torch.equal(outputs(model), expected)
    assert memory(model) == before
    if is_prepared:
        assert_prepared(model)


@pytest.mark.case("C6")
def test_values_that_went_away_and_came_back(folder: Path, expected: Tensor) -> None:
    model = loaded(folder, is_prepared=True)
    move_through_meta(model)
    assert torch.equal(outputs(model), expected)


@pytest.mark.case("C6")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_casts_leave_codes_scales_and_transforms(folder: Path, dtype: torch.dtype) -> None:
    model = loaded(folder, is_prepared=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.to(dtype)
    for name, value in model.state_dict().items():
        stays = name.endswith((".weight_packed", ".weight_scale", "_input.weight"))
        assert value.dtype == (before[name].dtype if stays else dtype), name
        assert not stays or torch.equal(value, before[name]), name


@pytest.mark.case("C6")
@pytest.mark.parametrize("name", ["nvfp4", "int4_g32", "int4_g32_asym"])
def test_scales_that_are_numbers_keep_their_types(folder: Path, name: str) -> None:
    """FP16 and E4M3 scales, and the float32 scale of a tensor; in memory only, no checkpoint holds them."""
    rule = FORMATS[name].default_rule
    recipe = load_recipe("rtn").changed({"weights.format": name, "weights.rule": rule, "activations": "none"})
    model = mxrot.quantize(folder.with_name("out-source"), recipe)
    assert isinstance(model, PreTrainedModel)
    before = {name: value.clone() for name, value in model.state_dict().items() if ".weight_" in name}
    assert {value.dtype for value in before.values()} - {torch.uint8}
    model.to(torch.bfloat16)
    for name, value in before.items():
        assert model.state_dict()[name].dtype == value.dtype and torch.equal(model.state_dict()[name], value), name


@pytest.mark.case("C6")
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_prepared_model_that_moves_to_a_gpu_is_prepared_there(folder: Path) -> None:
    model = loaded(folder, is_prepared=True)
    before = memory(model)
    model.to("cuda")
    assert_prepared(model)
    assert memory(model) == before
    model.to("cpu")
    assert_prepared(model)
    assert memory(model) == before


@pytest.mark.case("C6")
def test_a_prepared_model_is_prepared_again_where_it_arrives(folder: Path, expected: Tensor) -> None:
    """From the device without values to the CPU, where each finds its own again."""
    model = loaded(folder, is_prepared=True)
    before = memory(model)
    kept = {name: value.clone() for name, value in model.model.layers.state_dict().items()}
    model.model.layers.to("meta")
    places = {id(value): kept[name] for name, value in model.model.layers.named_parameters()}
    model.model.layers._apply(lambda tensor: places.get(id(tensor), torch.empty_like(tensor, device="cpu")))
    assert_prepared(model)
    assert memory(model) == before
    assert torch.equal(outputs(model), expected)


@pytest.mark.case("C6")
def test_a_part_of_a_site_that_moved_alone(folder: Path, expected: Tensor) -> None:
    model = loaded(folder, is_prepared=True)
    attention = model.model.layers[0].self_attn
    kept = copy.deepcopy(attention.k_proj.state_dict())
    attention.k_proj.to("meta")
    attention.k_proj.to_empty(device="cpu")
    attention.k_proj.load_state_dict(kept)
    assert torch.equal(outputs(model), expected)
    prepare_linears(model)
    assert_prepared(model)
    assert torch.equal(outputs(model), expected)
