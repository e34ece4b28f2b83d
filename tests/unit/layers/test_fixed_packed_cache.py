from __future__ import annotations

import pytest
import torch
from tests.tiny_model import tiny_config
from torch import Tensor

from mxrot.bench.cache import cache_scheme
from mxrot.bench.model import random_model
from mxrot.formats import CacheScheme, TensorQuantizer
from mxrot.layers import FixedPackedCache, quantize_cache, unmasked
from mxrot.models import find_family

MXFP4, INT4 = TensorQuantizer.of("mxfp4"), TensorQuantizer.of("int4_row_asym")
SCHEMES = [
    cache_scheme("mxfp8", "none", 32),
    CacheScheme(MXFP4, INT4, key_transform="hadamard"),
    CacheScheme(INT4, MXFP4, key_transform="stored", value_transform="hadamard"),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.spelled)
def test_token_by_token_it_is_the_whole(scheme: CacheScheme) -> None:
    """With a mask that moves, as in a CUDA graph; and with the visible tokens counted, without one."""
    config = tiny_config(architectures=["LlamaForCausalLM"], head_dim=32)
    model = random_model(config, torch.device("cpu")).float()
    family = find_family(config, "the model")
    for block in model.get_submodule(family.blocks).children():
        attention = block.get_submodule(family.attention)
        quantize_cache(attention, scheme, attention.head_dim, config.num_key_value_heads)
        for name in scheme.stored_names:
            getattr(attention, name).data.normal_(generator=torch.Generator().manual_seed(1))
    ids = torch.arange(14).view(2, 7) * 3
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        masked, counted = FixedPackedCache(9), FixedPackedCache(9)
        assert not masked.is_filled and masked.nbytes == 0
        for position in range(7):
            step = {"input_ids": ids[:, position : position + 1], "position_ids": torch.full((2, 1), position)}
            seen = (torch.arange(9) <= position)[None, None, None]
            masked.position = counted.position = torch.tensor([position])
            counted.visible = position + 1
            found = model(**step, past_key_values=masked, attention_mask=seen).logits
            close(found[:, 0], expected[:, position])
            with unmasked(model):
                close(model(**step, past_key_values=counted).logits, found)
    assert masked.is_filled and masked.get_seq_length() == 0
    heads, width = config.num_key_value_heads, config.head_dim
    each = sum(sum(one.stored_bytes(1, width)) for one in (scheme.keys, scheme.values))
    assert masked.nbytes == config.num_hidden_layers * 2 * heads * 9 * each


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
