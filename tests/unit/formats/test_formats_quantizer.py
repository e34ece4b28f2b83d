"""What a quantizer of weights says of their storage."""

import pytest
import torch

from mxrot.errors import ConfigError
from mxrot.formats import FORMATS, Format, TensorQuantizer, get_format, quantize

ROWS, COLUMNS = 24, 256


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_stored_parts_are_those_of_a_quantized_weight(format: Format) -> None:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    for rule in map(format.rule, format.rules):
        quantizer, quantized = TensorQuantizer(format, rule), quantize(weight, format, rule)
        tensors = {"weight_packed": quantized.packed()}
        tensors |= {f"weight_{name}": tensor for name, tensor in quantized.parts.tensors.items()}
        found = quantizer.stored_parts(ROWS, COLUMNS)
        assert list(found) == list(tensors)
        assert found == {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors.values()]
        assert quantizer.stored_bytes(ROWS, COLUMNS) == (sizes[0], sum(sizes[1:]))


def test_the_names_of_a_checkpoint() -> None:
    def names(format: str, rule: str | None = None) -> list[str]:
        return [*TensorQuantizer(get_format(format), get_format(format).rule(rule)).stored_parts(32, 128)]

    assert names("mxfp4") == ["weight_packed", "weight_scale"]
    assert names("mxfp4", "x3") == names("nvfp4") == ["weight_packed", "weight_scale", "weight_tensor_scale"]
    assert names("int4_g32_asym") == ["weight_packed", "weight_scale", "weight_zero_point"]


def test_rows_that_are_not_whole_blocks_are_refused() -> None:
    format = get_format("int4_g128")
    with pytest.raises(ConfigError, match=r"^rows of 192 elements are not a multiple of the block size 128"):
        TensorQuantizer(format, format.rule()).stored_parts(8, 192)
