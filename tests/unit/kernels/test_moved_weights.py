"""Weights that tuning moves: the kernels against their plain twins, and the twins' gradients against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mxrot.formats import get_format
from mxrot.formats.element import FloatElement
from mxrot.kernels import WeightMoves, moved_weights, plain_moved_weights, plain_moved_weights_gradients
from mxrot.tuning.tunable import neighbour_distances

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ELEMENTS = {name: get_format(name).element for name in ("mxfp4", "mxfp6_e2m3", "mxfp8_e4m3")}
FOLLOWS = {"none": 0, "site": 1, "block": 3}
cases = [pytest.mark.parametrize("element", ELEMENTS), pytest.mark.parametrize("follow", FOLLOWS)]


def element_of(name: str) -> FloatElement:
    element = ELEMENTS[name]
    assert isinstance(element, FloatElement)
    return element


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def problem(name: str, follow: str, rows: int = 75) -> tuple[Tensor, WeightMoves]:
    """Offsets up to one code, of random codes with -0 and both ends of the grid among them."""
    element = element_of(name)
    finite = [code for code, value in enumerate(element.values) if abs(value) <= element.max]
    generator = torch.Generator().manual_seed(0)
    codes = torch.tensor(finite)[torch.randint(len(finite), (rows, 96), generator=generator)].to(torch.uint8)
    scales = 2.0 ** torch.randint(-9, 4, (rows, 3), generator=generator)
    wide = scales.repeat_interleave(32, dim=1)
    values = torch.tensor(element.values)[codes.long()]
    start = [(x * wide).to(torch.bfloat16).to(DEVICE) for x in (values, *neighbour_distances(element, codes))]
    offset = 2 * torch.rand(rows, 96, generator=generator) - 1
    offset[0] = 0.0
    matrices = None
    if FOLLOWS[follow]:
        matrices = torch.eye(32, device=DEVICE) + 0.02 * random(FOLLOWS[follow], 32, 32, seed=1)
    return offset.to(DEVICE), WeightMoves(*start, scales.to(DEVICE), matrices)


def with_cases(test: Any) -> Any:
    for mark in cases:
        test = mark(test)
    return test


@with_cases
def test_the_kernel_moves_as_the_plain_twin(element: str, follow: str) -> None:
    """But for the order of sums, which may move a weight over a rounding boundary."""
    from mxrot.kernels.fused.moved_weights import moved_weights as fused

    offset, moves = problem(element, follow)
    found, expected = (run(offset, moves, element_of(element)) for run in (fused, plain_moved_weights))
    assert found.dtype == torch.bfloat16 == expected.dtype
    same = found == expected
    if follow == "none":
        assert same.all()
        assert torch.equal(found[0], moves.value[0])
    assert same.double().mean() > 0.999
    wide = moves.scales.repeat_interleave(32, dim=1)
    assert ((found.float() - expected.float()).abs() <= wide * element_of(element).max / 4).all()


@with_cases
def test_the_kernel_finds_the_gradients_of_the_plain_twin(element: str, follow: str) -> None:
    from mxrot.kernels.fused.moved_weights import moved_weights_gradients as fused

    offset, moves = problem(element, follow)
    for wants_exponent in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            gradient = random(75, 96, seed=2).to(dtype)
            arguments = gradient, offset, moves, element_of(element), wants_exponent
            found, expected = fused(*arguments), plain_moved_weights_gradients(*arguments)
            torch.testing.assert_close(found.offset, expected.offset, rtol=1e-4, atol=1e-5)
            for ours, theirs in ((found.follow, expected.follow), (found.exponent, expected.exponent)):
                assert (ours is None) == (theirs is None)
                if ours is not None and theirs is not None:
                    close = (ours - theirs).abs() <= 1e-4 * theirs.abs().max()
                    assert ours.shape == theirs.shape and close.double().mean() > 0.99
            assert (found.follow is None) == (follow == "none") and (found.exponent is None) != wants_exponent


@with_cases
def test_gradients_are_those_of_the_function_without_rounding(element: str, follow: str) -> None:
    offset, moves = problem(element, follow)
    gradient = random(75, 96, seed=2)
    found = plain_moved_weights_gradients(gradient, offset, moves, element_of(element), False)
    free = offset.clone().requires_grad_()
    weight = moves.value.float() + free * torch.where(offset > 0, moves.up, moves.down).float()
    matrices = moves.follow
    if matrices is not None:
        matrices = matrices.clone().requires_grad_()
        weight = torch.einsum("ngb,gbc->ngc", weight.unflatten(1, (3, 32)), matrices.expand(3, 32, 32)).flatten(1)
    (weight * gradient).sum().backward()
    assert free.grad is not None
    torch.testing.assert_close(found.offset, free.grad, rtol=1e-4, atol=1e-5)
    if matrices is not None:
        assert matrices.grad is not None and found.follow is not None
        torch.testing.assert_close(found.follow, matrices.grad, rtol=1e-3, atol=1e-2)


def test_the_gradient_of_an_exponent_is_that_of_a_scale_with_rounding_passed_through() -> None:
    """d/de of 2^e round(w / 2^e), where round(u) counts as u, and as a constant where it is cut off."""
    element = element_of("mxfp4")
    offset, moves = problem("mxfp4", "block")
    gradient = random(75, 96, seed=2)
    found = plain_moved_weights_gradients(gradient, offset, moves, element, True).exponent
    exponent = torch.zeros_like(moves.scales).requires_grad_()
    scales = (moves.scales * torch.exp2(exponent)).repeat_interleave(32, dim=1)
    distance = torch.where(offset > 0, moves.up, moves.down).float()
    assert moves.follow is not None
    weight = (moves.value.float() + offset * distance).unflatten(1, (3, 32))
    scaled = torch.einsum("ngb,gbc->ngc", weight, moves.follow).flatten(1) / scales
    cut = scaled.clamp(-element.max, element.max)
    rounded = cut + (element.round(scaled) - cut).detach()
    (scales * rounded * gradient).sum().backward()
    assert exponent.grad is not None and found is not None
    torch.testing.assert_close(found, exponent.grad, rtol=1e-3, atol=1e-3)


def test_on_a_cpu_the_twin_runs() -> None:
    offset, moves = problem("mxfp4", "block")
    expected = plain_moved_weights(offset, moves, element_of("mxfp4"))
    assert (moved_weights(offset, moves, element_of("mxfp4")) == expected).double().mean() > 0.999
