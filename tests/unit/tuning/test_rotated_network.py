"""The network that rotations are trained in: its gradients beside finite differences, and how it is computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.tiny_model import random_windows
from tests.unit.surgery.changed_sources import write_with_biases
from tests.unit.tuning.rotated_networks import loss_and_gradients, network_of, network_with, random_rotations
from torch import Tensor

from mxrot.models import FolderSource
from mxrot.surgery import Rotations
from mxrot.transforms import BlockDiagonal, HadamardOfWidth, SiteTransform
from mxrot.transforms.base import random_orthogonal
from mxrot.tuning.rotated_network import ROOM, Pieces, RotatedNetwork
from mxrot.tuning.trained_sites import TrainedSite

WINDOWS = random_windows(3, 20)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> FolderSource:
    return FolderSource(write_with_biases(tmp_path_factory.mktemp("exact")))


def smooth(x: Tensor) -> Tensor:
    """Stands for rounding: no linear map, so that the loss depends on the rotations."""
    return x + 0.1 * torch.sin(7 * x)


def with_transforms(source: FolderSource) -> RotatedNetwork:
    """Smooth stand-ins behind transforms of all kinds that are applied at run time."""
    blocks = BlockDiagonal(random_orthogonal(1, 32, torch.Generator().manual_seed(1)))
    of_sites = {"down": SiteTransform((HadamardOfWidth(),)), "gate_up": SiteTransform((HadamardOfWidth(), blocks))}
    sites = [TrainedSite(site, of_sites.get(site.name), smooth, smooth) for site in source.family.sites]
    return network_with(source, WINDOWS, [sites] * 2)


def moved(matrices: Tensor, direction: Tensor) -> Tensor:
    """Along the orthogonal matrices, in a skew direction."""
    return torch.linalg.matrix_exp(direction) @ matrices


@pytest.mark.parametrize("kind", ["plain", "transformed"])
def test_gradients_are_finite_differences(source: FolderSource, kind: str) -> None:
    network = network_of(source, WINDOWS, smooth, smooth) if kind == "plain" else with_transforms(source)
    rotations = random_rotations(source)
    _, *gradients = loss_and_gradients(network, WINDOWS, rotations)
    generator = torch.Generator().manual_seed(2)
    for name, gradient in zip(("residual", "value_heads"), gradients, strict=True):
        matrices = getattr(rotations, name)
        square = torch.randn(matrices.shape, generator=generator, dtype=torch.float64)
        skew = square - square.mT
        step = 1e-5

        def loss(sign: float, name: str = name, skew: Tensor = skew, matrices: Tensor = matrices) -> float:
            there = replace(rotations, **{name: moved(matrices, sign * 1e-5 * skew)})
            with network.open():
                return network.loss(WINDOWS, there.residual, there.value_heads, learns=False)

        expected = (loss(1) - loss(-1)) / (2 * step)
        assert abs(expected) > 1e-4
        # The differences: (step |K|)^2 of the third derivative, and 1e-16 / step of rounding.
        assert float((gradient * (skew @ matrices)).sum()) == pytest.approx(expected, rel=1e-5)


def test_pieces_and_recomputation_change_nothing(source: FolderSource) -> None:
    network, rotations = with_transforms(source), random_rotations(source)
    assert network.pieces == Pieces(3, recompute=False)
    expected = loss_and_gradients(network, WINDOWS, rotations)
    for pieces in (Pieces(1, False), Pieces(2, True)):
        found = loss_and_gradients(replace(network, pieces=pieces), WINDOWS, rotations)
        assert found[0] == pytest.approx(expected[0], rel=1e-13)
        for one, other in zip(found[1:], expected[1:], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_large_models_are_computed_in_pieces(source: FolderSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal sizes; all at once where that fits, and each block once more if not."""
    network = network_of(source, WINDOWS)

    def pieces(room: float) -> Pieces:
        monkeypatch.setitem(ROOM, "cpu", room)
        return Pieces.of(network.model, network.family, (8, 20), torch.float64)

    found = [pieces(room) for room in (1e4, 5e5, 8e5, 1.5e6, 1e8)]
    assert found[0] == Pieces(1, True) and found[-1] == Pieces(8, False)
    assert [one.windows for one in found[:-1]] == sorted(one.windows for one in found[:-1])
    assert all(one.recompute for one in found[:-1]) and len(set(found)) > 3
    assert Pieces.within(100, batch=8, blocks=4, weights=10, window=10, states=2) == Pieces(4, True)  # not 5 and 3
    assert Pieces.within(360, batch=8, blocks=4, weights=10, window=10, states=2) == Pieces(8, False)
    assert Pieces.within(359, batch=8, blocks=4, weights=10, window=10, states=2) == Pieces(8, True)


def test_float32_is_enough(source: FolderSource) -> None:
    """A gradient in float32 is off by some roundings of 2**-24, which the network's own bfloat16 products drown."""
    rotations = random_rotations(source)
    exact = loss_and_gradients(network_of(source, WINDOWS, smooth, smooth), WINDOWS, rotations)
    single = network_of(source, WINDOWS, smooth, smooth, torch.float32)
    found = loss_and_gradients(single, WINDOWS, rotations)
    assert found[0] == pytest.approx(exact[0], rel=64 * 2.0**-24)
    for one, other in zip(found[1:], exact[1:], strict=True):
        assert one.dtype == torch.float64
        assert float((one - other).norm() / other.norm()) < 256 * 2.0**-24


def test_one_rotation_may_be_none(source: FolderSource) -> None:
    both = random_rotations(source)
    network = network_of(source, WINDOWS)
    with network.open():
        losses = [
            network.loss(WINDOWS, one.residual, one.value_heads, learns=False)
            for one in (both, Rotations(both.residual), Rotations(None, both.value_heads), Rotations())
        ]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-12)


def test_inputs_are_quantized_once_for_all_readers(source: FolderSource) -> None:
    """And hooks are gone when the network is closed."""
    calls: list[int] = []

    def counted(x: Tensor) -> Tensor:
        calls.append(x.shape[-1])
        return x

    network = network_of(source, WINDOWS, counted)
    with network.open():
        network.loss(WINDOWS, None, None, learns=False)
    assert calls == [64, 64, 64, 96] * 2
    assert not any(module._forward_pre_hooks for module in network.model.modules())


def test_the_loss_is_that_of_transformers(source: FolderSource, tmp_path: Path) -> None:
    network = network_of(source, WINDOWS)
    with network.open():
        found = network.loss(WINDOWS, None, None, learns=False)
        expected = network.model(WINDOWS, labels=WINDOWS).loss
    assert found == pytest.approx(float(expected), rel=1e-6)  # transformers computes it in float32
