import re

import pytest
import torch
from tests.oracles.sample_blocks import bits
from tests.unit.surgery.tiny_llama import first_block, tiny_llama
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from mxrot.formats import QTensor, TensorQuantizer, get_format, quantize
from mxrot.layers import InputTransform, QuantLinear
from mxrot.models import Site
from mxrot.models.families.llama import FAMILY as LLAMA
from mxrot.scheme import scheme_name
from mxrot.surgery import install_empty_site, stored_tensors
from mxrot.transforms import BlockDiagonal, BlockDiagonalSpec
from mxrot.transforms.base import random_orthogonal

QKV, _, GATE_UP, DOWN = LLAMA.sites
MXFP4 = TensorQuantizer(get_format("mxfp4"), get_format("mxfp4").rule())


def stored_transform(count: int = 1) -> Tensor:
    return BlockDiagonal(random_orthogonal(count, 32, torch.Generator().manual_seed(0))).to_stored()


def quantized_linears(block: nn.Module, site: Site) -> dict[str, QTensor]:
    return {name: quantize(block.get_parameter(f"{name}.weight"), MXFP4.format) for name in site.linears}


def transform_of(stored: Tensor | None) -> InputTransform | None:
    spec = BlockDiagonalSpec(32, "site" if stored is None or stored.dim() == 2 else "block")
    return None if stored is None else InputTransform((spec,), {"weight": stored})


def block_with(site: Site, transform: Tensor | None) -> tuple[LlamaDecoderLayer, dict[str, QTensor]]:
    block = first_block(tiny_llama(torch.float32, biases=True))
    quantized = quantized_linears(block, site)
    install_empty_site(block, scheme_name(0, site), site, transform_of(transform), MXFP4, MXFP4)
    for name, weight in quantized.items():
        linear = block.get_submodule(name)
        assert isinstance(linear, QuantLinear)
        linear.set_weight(weight)
    return block, quantized


@pytest.mark.parametrize("site", LLAMA.sites, ids=lambda site: site.name)
def test_the_linears_of_a_site_and_no_others_are_replaced(site: Site) -> None:
    block, quantized = block_with(site, stored_transform())
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    replaced = {name: module for name, module in block.named_modules() if isinstance(module, QuantLinear)}
    assert set(replaced) == set(site.linears)
    assert set(linears) == {name for other in LLAMA.sites for name in other.linears} - set(site.linears)
    for name, module in replaced.items():
        assert torch.equal(module.qtensor().codes, quantized[name].codes)
        assert torch.equal(module.dequantized_weight(), quantized[name].dequantize())
        assert module.activations is MXFP4 and module.bias is not None


def test_the_first_linear_owns_the_transform_and_the_others_share_it() -> None:
    block, _ = block_with(QKV, stored_transform())
    key = "self_attn.q_proj.layer0_qkv_input.weight"
    assert [name for name in block.state_dict() if "input.weight" in name] == [key]
    owner = block.get_submodule("self_attn.q_proj.layer0_qkv_input")
    for name in QKV.linears:
        linear = block.get_submodule(name)
        assert isinstance(linear, QuantLinear) and linear.transform is owner
    # One object: what is loaded into the owner is what the others apply.
    new = stored_transform() * 2
    block.load_state_dict({**block.state_dict(), key: new}, assign=True)
    value = block.get_submodule("self_attn.v_proj")
    assert isinstance(value, QuantLinear) and value.transform is not None
    assert torch.equal(value.transform.weight, new)


def test_without_a_transform_nothing_is_registered() -> None:
    block, _ = block_with(GATE_UP, None)
    up = block.get_submodule("mlp.up_proj")
    assert isinstance(up, QuantLinear) and up.transform is None
    assert not any(isinstance(module, InputTransform) for module in block.modules())


def test_a_site_with_ignored_linears_gives_the_transform_to_its_first() -> None:
    (site,) = (s for s in LLAMA.active_sites(0, ("q_proj",)) if s.name == "qkv")
    block, _ = block_with(site, stored_transform(2))
    assert isinstance(block.get_submodule("self_attn.q_proj"), nn.Linear)
    assert block.get_parameter("self_attn.k_proj.layer0_qkv_input.weight").shape == (2, 32, 32)


def test_an_empty_site_has_the_shapes_of_a_full_one() -> None:
    full, _ = block_with(DOWN, stored_transform(3))
    empty = first_block(tiny_llama(torch.float32, biases=True))
    install_empty_site(
        empty, scheme_name(0, DOWN), DOWN, transform_of(torch.zeros_like(stored_transform(3))), MXFP4, MXFP4
    )
    shapes = {name: (value.shape, value.dtype) for name, value in full.state_dict().items()}
    assert {name: (value.shape, value.dtype) for name, value in empty.state_dict().items()} == shapes
    down = empty.get_submodule("mlp.down_proj")
    assert isinstance(down, QuantLinear) and down.weight_packed.sum() == 0
    empty.load_state_dict(full.state_dict())
    assert all(torch.equal(value, full.state_dict()[name]) for name, value in empty.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_stored_tensors_keeps_what_is_quantized_and_casts_the_rest(dtype: torch.dtype) -> None:
    block, _ = block_with(QKV, stored_transform())
    stored, state = stored_tensors(block, dtype), block.state_dict()
    assert stored.keys() == state.keys()
    for name, value in stored.items():
        if name.endswith(("weight_packed", "weight_scale")):
            assert value.dtype == torch.uint8 and torch.equal(value, state[name])
        elif name.endswith("_input.weight"):
            assert value.dtype == torch.bfloat16 and torch.equal(bits(value), bits(state[name]))
        else:
            assert value.dtype == dtype and torch.equal(value, state[name].to(dtype))
        assert not value.requires_grad
    assert stored["self_attn.q_proj.bias"].dtype == stored["mlp.up_proj.weight"].dtype == dtype


def test_stored_tensors_keeps_every_kind_of_scale() -> None:
    """FP16 scales with zero points, and NVFP4's one float32 a tensor, in a checkpoint of bfloat16."""
    for name, expected in (
        ("int4_g32_asym", {"weight_scale": torch.float16, "weight_zero_point": torch.uint8}),
        ("nvfp4", {"weight_scale": torch.float8_e4m3fn, "weight_tensor_scale": torch.float32}),
    ):
        quantizer = TensorQuantizer(get_format(name), get_format(name).rule())
        linear = QuantLinear(64, 8, quantizer, None)
        linear.set_weight(quantize(torch.randn(8, 64, generator=torch.Generator()), quantizer.format))
        stored = stored_tensors(linear, torch.bfloat16)
        assert {key: value.dtype for key, value in stored.items() if key != "weight_packed"} == expected


def test_scheme_names_are_of_lower_case_digits_and_underscores() -> None:
    assert scheme_name(11, DOWN) == "layer11_down"
    assert all(re.fullmatch(r"[a-z0-9_]+", scheme_name(0, site)) for site in LLAMA.sites)
