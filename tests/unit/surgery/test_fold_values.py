"""A matrix a value head, merged into what makes values and what reads them: the function stays, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxrot.models import FAMILIES
from mxrot.surgery.fold_values import fold_values, reader_moments

HEADS, GROUP, D, WIDTH, OUT, TOKENS = 2, 3, 4, 10, 6, 7


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def attended(x: Tensor, values: Tensor, bias: Tensor | None, reader: Tensor, p: Tensor) -> Tensor:
    """What o_proj gives, for probabilities [query heads, tokens, tokens]; values are the last rows of a linear."""
    v = x @ values.T if bias is None else x @ values.T + bias
    v = v[:, -HEADS * D :].unflatten(1, (HEADS, D)).transpose(0, 1).repeat_interleave(GROUP, dim=0)
    return (p @ v).transpose(0, 1).flatten(1) @ reader.T


@pytest.mark.parametrize("name", ["llama", "phi3"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_function_stays(name: str, has_bias: bool) -> None:
    family = FAMILIES[name]
    before = 0 if name == "llama" else HEADS * GROUP * D + HEADS * D
    values, reader = rand(before + HEADS * D, WIDTH), rand(OUT, HEADS * GROUP * D, seed=1)
    bias = rand(before + HEADS * D, seed=2) if has_bias else None
    matrices = rand(HEADS, D, D, seed=3)
    x, p = rand(TOKENS, WIDTH, seed=4), rand(HEADS * GROUP, TOKENS, TOKENS, seed=5)
    weights = {family.values: values, family.values_read_by: reader}
    folded = fold_values(weights, bias, family, matrices)
    found = attended(x, weights[family.values], folded, weights[family.values_read_by], p)
    assert torch.allclose(found, attended(x, values, bias, reader, p), rtol=1e-11, atol=1e-11)
    assert torch.equal(weights[family.values][:before], values[:before])
    turned = (x @ weights[family.values].T)[:, -HEADS * D :].unflatten(1, (HEADS, D))
    assert torch.allclose(
        turned, torch.einsum("thd,hde->the", (x @ values.T)[:, -HEADS * D :].view(-1, HEADS, D), matrices)
    )
    assert (folded is None) == (bias is None)


def test_what_comes_is_float64_that_no_type_has_rounded() -> None:
    family = FAMILIES["llama"]
    weights = {
        family.values: rand(HEADS * D, WIDTH).bfloat16(),
        family.values_read_by: rand(OUT, HEADS * GROUP * D).half(),
    }
    fold_values(weights, None, family, rand(HEADS, D, D, seed=3))
    for weight in weights.values():
        assert weight.dtype == torch.float64 and not torch.equal(weight, weight.float().double())


def test_moments_of_the_readers_are_those_of_all_columns_that_read_a_head() -> None:
    reader = rand(OUT, HEADS * GROUP * D)
    expected = torch.zeros(HEADS, D, D, dtype=torch.float64)
    for head in range(HEADS * GROUP):
        for row in reader:
            own = row[head * D : (head + 1) * D]
            expected[head // GROUP] += torch.outer(own, own)
    assert torch.allclose(reader_moments(reader, HEADS, D), expected, rtol=1e-12)
