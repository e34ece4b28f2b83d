"""KL divergence of logits with its gradient, a row a program (Triton).

Reads both rows twice and writes the gradient once; as a chain of operations it is ten times the traffic.
`plain_divergence` is the specification, up to the order of float32 sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096


@triton.jit
def _divergence(
    expected_pointer,
    found_pointer,
    loss_pointer,
    gradient_pointer,
    width,
    expected_stride,
    found_stride,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    expected_pointer += row * expected_stride
    found_pointer += row * found_stride
    gradient_pointer += row * width
    largest_expected = tl.full([], float("-inf"), tl.float32)
    largest_found = tl.full([], float("-inf"), tl.float32)
    sum_expected = tl.zeros([], tl.float32)
    sum_found = tl.zeros([], tl.float32)
    for start in range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        mask = columns < width
        expected = tl.load(expected_pointer + columns, mask=mask, other=float("-inf")).to(tl.float32)
        found = tl.load(found_pointer + columns, mask=mask, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest_expected, tl.max(expected, axis=0))
        sum_expected = sum_expected * tl.exp(largest_expected - larger) + tl.sum(tl.exp(expected - larger), axis=0)
        largest_expected = larger
        larger = tl.maximum(largest_found, tl.max(found, axis=0))
        sum_found = sum_found * tl.exp(largest_found - larger) + tl.sum(tl.exp(found - larger), axis=0)
        largest_found = larger
    norm_expected = largest_expected + tl.log(sum_expected)
    norm_found = largest_found + tl.log(sum_found)
    loss = tl.zeros([], tl.float32)
    for start in range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        mask = columns < width
        expected = tl.load(expected_pointer + columns, mask=mask, other=0.0).to(tl.float32) - norm_expected
        found = tl.load(found_pointer + columns, mask=mask, other=0.0).to(tl.float32) - norm_found
        chance = tl.exp(expected)
        loss += tl.sum(tl.where(mask, chance * (expected - found), 0.0), axis=0)
        gradient = tl.exp(found) - chance
        tl.store(gradient_pointer + columns, gradient.to(gradient_pointer.dtype.element_ty), mask=mask)
    tl.store(loss_pointer + row, loss)


def divergence(expected: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """As `plain_divergence` defines it."""
    rows, width = found.shape
    loss = torch.empty(rows, device=found.device)
    gradient = torch.empty_like(found, memory_format=torch.contiguous_format)
    _divergence[(rows,)](
        expected, found, loss, gradient, width, expected.stride(0), found.stride(0), COLUMNS=COLUMNS, num_warps=8
    )
    return loss, gradient
