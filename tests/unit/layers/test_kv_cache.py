"""Keys and values at addresses that stay."""

import torch
from torch import Tensor

from mxrot.layers import FixedCache


def states(token: float) -> tuple[Tensor, Tensor]:
    """Keys and values of one token of two sequences, three heads of width 4."""
    return torch.full((2, 3, 1, 4), token), torch.full((2, 3, 1, 4), -token)


def put(cache: FixedCache, token: float, position: int, layer: int = 0) -> tuple[Tensor, Tensor]:
    cache.position = torch.tensor([position])
    found: tuple[Tensor, Tensor] = cache.update(*states(token), layer)
    return found


def test_a_token_is_kept_where_it_belongs_and_the_rest_is_zero() -> None:
    cache = FixedCache(5)
    assert not cache.is_filled and cache.get_seq_length() == 0
    put(cache, 1.0, 0)
    keys, values = put(cache, 3.0, 2)
    assert keys.shape == values.shape == (2, 3, 5, 4) and cache.is_filled
    assert keys[0, 0, :, 0].tolist() == [1.0, 0.0, 3.0, 0.0, 0.0]
    assert torch.equal(values, -keys)


def test_attention_is_given_what_is_visible() -> None:
    cache = FixedCache(5)
    cache.visible = 3
    keys, _ = put(cache, 1.0, 1)
    assert keys.shape == (2, 3, 3, 4)
    cache.visible = 5
    assert put(cache, 2.0, 4)[0][0, 0, :, 0].tolist() == [0.0, 1.0, 0.0, 0.0, 2.0]


def test_layers_are_apart_and_addresses_stay() -> None:
    cache = FixedCache(5)
    first, other = put(cache, 1.0, 0)[0], put(cache, 2.0, 0, layer=1)[0]
    assert first.data_ptr() != other.data_ptr() and first[0, 0, 0, 0] == 1.0 and other[0, 0, 0, 0] == 2.0
    assert put(cache, 3.0, 1)[0].data_ptr() == first.data_ptr()
