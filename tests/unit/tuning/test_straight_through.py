"""Forward what a deployed model computes, backward as if nothing were rounded."""

import pytest
import torch
from torch import Tensor

from mxrot.formats import get_format
from mxrot.kernels import plain_rotate_quantize
from mxrot.layers import TensorQuantizer
from mxrot.transforms.base import BlockTransform, apply_matrices
from mxrot.tuning.straight_through import InverseTransposed, RotateQuantize, RoundToStored, StepTo

FORMAT = get_format("mxfp4")
QUANTIZER = TensorQuantizer(FORMAT, FORMAT.rule())


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("groups", [1, 3])
def test_the_gradient_of_a_quantized_transform_is_that_of_the_transform(groups: int) -> None:
    x, matrices, weight = random(2, 5, 96, seed=0), random(groups, 32, 32, seed=1), random(96, seed=2)
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
    expected = BlockTransform(matrices.double()).as_applied().matrices.float()
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


def test_a_step_to_a_neighbour() -> None:
    offset = torch.tensor([-0.9, -0.5, -0.2, 0.0, 0.3, 0.5, 0.51]).requires_grad_()
    value, up, down = torch.full((7,), 2.0), torch.full((7,), 1.0), torch.full((7,), 0.5)
    found = StepTo.apply(offset, value, up, down)
    assert found.tolist() == [1.5, 2, 2, 2, 2, 2, 3]
    found.sum().backward()
    assert offset.grad is not None and offset.grad.tolist() == [0.5, 0.5, 0.5, 0.5, 1, 1, 1]
