"""What an input transform keeps between calls."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from mxrot.layers import InputTransform
from mxrot.layers.product import applied_matrices
from mxrot.transforms.base import random_orthogonal
from mxrot.transforms.stages import BlockDiagonal, BlockDiagonalSpec


def stored(seed: int) -> Tensor:
    return BlockDiagonal(random_orthogonal(3, 32, torch.Generator().manual_seed(seed))).to_stored()


def holding(weight: Tensor) -> InputTransform:
    return InputTransform((BlockDiagonalSpec(32, "block"),), {"weight": weight})


def test_matrices_are_made_once() -> None:
    transform = holding(stored(0))
    assert transform.matrices() is transform.matrices()
    assert torch.equal(transform.matrices(), applied_matrices(transform.weight))


@pytest.mark.parametrize("change", ["in place", "data", "parameter", "loaded", "moved"])
def test_matrices_are_made_again_when_the_stored_tensor_changes(change: str) -> None:
    transform = holding(stored(0))
    before = transform.matrices()
    other = stored(1)
    if change == "in place":
        transform.weight.copy_(other)
    elif change == "data":
        transform.weight.data = other
    elif change == "parameter":
        transform.weight = torch.nn.Parameter(other, requires_grad=False)
    elif change == "loaded":
        transform.load_state_dict({"weight": other})
    else:
        transform.to("meta")
        transform.to_empty(device="cpu")
        transform.load_state_dict({"weight": other})
    assert torch.equal(transform.matrices(), applied_matrices(other))
    assert not torch.equal(transform.matrices(), before)


def test_memory_that_is_given_back_and_taken_again_is_another_tensor() -> None:
    """The allocator hands out the address of a stored tensor that was replaced, to the next one of its size."""
    transform, second, third = holding(stored(0)), stored(1), stored(2)
    transform.matrices()
    place = transform.weight.data_ptr()
    transform.weight.data = second
    candidates = [torch.empty_like(third) for _ in range(50)]
    found = next((candidate for candidate in candidates if candidate.data_ptr() == place), candidates[0])
    transform.weight.data = found.copy_(third)
    assert torch.equal(transform.matrices(), applied_matrices(third))


def test_inside_inference_mode_a_change_in_place_is_seen() -> None:
    with torch.inference_mode():
        transform = holding(stored(0) * 1)
        transform.matrices()
        transform.weight.copy_(stored(1))
        assert torch.equal(transform.matrices(), applied_matrices(stored(1)))


def test_without_an_input_a_call_gives_the_matrices() -> None:
    """What hooks that bring offloaded values need: nothing is read outside of a call."""
    transform = holding(stored(0))
    expected = applied_matrices(transform.weight)
    kept = transform.weight.data.clone()
    transform.to("meta")
    brought = torch.nn.Parameter(kept, requires_grad=False)
    transform.register_forward_pre_hook(lambda module, _: setattr(module, "weight", brought))
    assert torch.equal(transform.matrices(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_a_cast_leaves_the_matrices(dtype: torch.dtype) -> None:
    transform = holding(stored(0))
    transform.prepare()
    before, prepared = transform.matrices(), transform.prepared
    transform.to(dtype)
    assert transform.weight.dtype == torch.bfloat16
    assert torch.equal(transform.matrices(), before)
    assert transform.prepared is not None and prepared is not None and torch.equal(transform.prepared, prepared)


def test_a_copy_keeps_no_matrices_of_the_original() -> None:
    transform = holding(stored(0))
    transform.matrices()
    copied = copy.deepcopy(transform)
    assert copied._applied is None and torch.equal(copied.matrices(), transform.matrices())
