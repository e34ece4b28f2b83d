"""Forward what a deployed model computes, backward as if nothing were rounded."""

import math

import pytest
import torch
from torch import Tensor

from mxrot.formats import TensorQuantizer, get_format
from mxrot.kernels import WeightMoves, plain_rotate_quantize
from mxrot.transforms.stages import BlockDiagonal, apply_matrices
from mxrot.tuning.straight_through import (
    Divergence,
    InverseTransposed,
    MoveWeights,
    RotateQuantize,
    RoundToStored,
)

FORMAT = get_format("mxfp4")
QUANTIZER = TensorQuantizer(FORMAT, FORMAT.rule())


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("groups", [1, 3])
def test_the_gradient_of_a_quantized_transform_is_that_of_the_transform(groups: int) -> None:
    x, matrices, weight = (
        random(2, 5, 96, seed=0),
        random(groups, 32, 32, seed=1).bfloat16().float(),
        random(96, seed=2),
    )
    ours = x.clone().requires_grad_(), matrices.clone().requires_grad_()
    found = RotateQuantize.apply(*ours, QUANTIZER)
    assert torch.equal(found, plain_rotate_quantize(x, matrices, FORMAT, QUANTIZER.rule))
    (found * weight).sum().backward()
    theirs = x.clone().requires_grad_(), matrices.clone().requires_grad_()
    (apply_matrices(*theirs) * weight).sum().backward()
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.grad is not None and expected.grad is not None
        torch.testing.assert_close(mine.grad, expected.grad, rtol=1e-5, atol=1e-5)


def test_a_transform_without_a_gradient_gets_none() -> None:
    x, matrices = random(4, 32, seed=0).requires_grad_(), random(1, 32, 32, seed=1)
    RotateQuantize.apply(x, matrices, QUANTIZER).sum().backward()
    assert x.grad is not None and matrices.grad is None


def test_rounding_to_what_is_stored() -> None:
    matrices = random(3, 32, 32, seed=0)
    expected = BlockDiagonal(matrices.double()).as_applied().matrices.float()
    ours = matrices.clone().requires_grad_()
    found = RoundToStored.apply(ours)
    # sqrt(B) T is formed in float32 here and in float64 there.
    assert ((found - expected).abs() <= 2.0**-7 * expected.abs()).all()
    assert (found == expected).double().mean() > 0.99
    (found * 3).sum().backward()
    assert ours.grad is not None and (ours.grad == 3).all()


def test_the_gradient_of_an_inverse_that_is_there_already() -> None:
    matrices, weight = torch.eye(8).double() + 0.2 * random(3, 8, 8, seed=0).double(), random(3, 8, 8, seed=1).double()
    ours, theirs = matrices.clone().requires_grad_(), matrices.clone().requires_grad_()
    inverse = torch.linalg.inv(matrices)
    found = InverseTransposed.apply(ours, inverse)
    (found * weight).sum().backward()
    expected = torch.linalg.inv(theirs).mT
    (expected * weight).sum().backward()
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)


def starts(offset: Tensor) -> WeightMoves:
    """The value 2 of E2M1 under a scale of 1: 3 is next, 1.5 before it."""
    ones = torch.ones_like(offset)
    return WeightMoves(
        (2 * ones).bfloat16(), ones.bfloat16(), (0.5 * ones).bfloat16(), torch.ones(len(offset), offset.shape[1] // 32)
    )


def test_an_offset_beyond_a_half_is_the_neighbour() -> None:
    offset = torch.tensor([-0.9, -0.6, -0.2, 0.0, 0.3, 0.49, 0.51, 1.0]).repeat(4)[None].requires_grad_()
    found = MoveWeights.apply(offset, None, None, starts(offset.detach()), FORMAT.element)
    assert found[0, :8].tolist() == [1.5, 1.5, 2, 2, 2, 2, 3, 3]
    found.float().sum().backward()
    assert offset.grad is not None and offset.grad[0, :8].tolist() == [0.5, 0.5, 0.5, 0.5, 1, 1, 1, 1]


def test_an_exponent_beyond_a_half_doubles_the_scale() -> None:
    exponent = torch.tensor([[-0.6], [0.4], [0.6]]).requires_grad_()
    offset = torch.full((3, 32), 0.3).requires_grad_()
    found = MoveWeights.apply(offset, None, exponent, starts(offset.detach()), FORMAT.element)
    assert found[:, 0].tolist() == [2, 2, 2]  # 2.3 on the grids of 1/2, 1 and 2
    found.float().sum().backward()
    # ln 2 times what rounding added, which is -0.3 thirty-two times
    assert exponent.grad is not None
    torch.testing.assert_close(exponent.grad, torch.full((3, 1), -0.3 * 32 * math.log(2)))


def test_the_divergence_and_its_gradient() -> None:
    expected, found = random(5, 40, seed=0), random(5, 40, seed=1).requires_grad_()
    twin = found.detach().clone().requires_grad_()
    ours = Divergence.apply(found, expected)
    theirs = torch.nn.functional.kl_div(
        twin.log_softmax(-1), expected.log_softmax(-1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(ours, theirs)
    (3 * ours).backward()
    (3 * theirs).backward()
    assert found.grad is not None and twin.grad is not None
    torch.testing.assert_close(found.grad, twin.grad, rtol=1e-4, atol=1e-7)
