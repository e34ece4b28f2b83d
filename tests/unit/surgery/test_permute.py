"""Channels of an MLP in another order."""

from pathlib import Path

import pytest
import torch
from tests.tiny_model import write_tiny_mixture
from tests.unit.surgery.changed_sources import logits, off_by, write_with_biases

from mxrot.errors import ConfigError
from mxrot.models import FolderSource
from mxrot.surgery import PermutedFfn

DOWN = "model.layers.1.mlp.down_proj"
ORDER = torch.randperm(96, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def exact(tmp_path: Path) -> FolderSource:
    return FolderSource(write_with_biases(tmp_path / "exact"))


def test_a_permuted_model_is_the_same_function(exact: FolderSource) -> None:
    """Sums run in another order: some thousand roundings of 2**-53."""
    source = PermutedFfn(exact, {DOWN: ORDER})
    assert 0 < off_by(logits(source), logits(exact)) < 1e-12
    before, after = exact.block(1), source.block(1)
    assert torch.equal(after["mlp.down_proj.weight"], before["mlp.down_proj.weight"][:, ORDER])
    for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.gate_proj.bias", "mlp.up_proj.bias"):
        assert torch.equal(after[name], before[name][ORDER]) and not torch.equal(after[name], before[name])
    others = before.keys() - {f"mlp.{one}_proj.{kind}" for one in ("gate", "up", "down") for kind in ("weight", "bias")}
    assert others and all(torch.equal(after[name], before[name]) for name in {*others, "mlp.down_proj.bias"})
    assert all(torch.equal(tensor, exact.block(0)[name]) for name, tensor in source.block(0).items())


def test_the_inverse_order_gives_every_bit_back(exact: FolderSource) -> None:
    source = PermutedFfn(PermutedFfn(exact, {DOWN: ORDER}), {DOWN: ORDER.argsort()})
    assert all(torch.equal(tensor, exact.block(1)[name]) for name, tensor in source.block(1).items())
    assert len(set(source.changes)) == 2


def test_each_expert_has_an_order_of_its_own(tmp_path: Path) -> None:
    exact = FolderSource(write_tiny_mixture(tmp_path / "tiny", "mixtral", torch.float64))
    place = "model.layers.0.mlp.experts"
    source = PermutedFfn(exact, {f"{place}.0.w2": ORDER, f"{place}.3.w2": ORDER.flip(0)})
    changed = {name for name, tensor in source.block(0).items() if not torch.equal(tensor, exact.block(0)[name])}
    assert changed == {f"mlp.experts.{number}.{name}.weight" for number in (0, 3) for name in ("w1", "w2", "w3")}
    # Shares of experts are float32.
    assert off_by(logits(source), logits(exact)) < 2.0**-22


@pytest.mark.parametrize(
    ("name", "order", "message"),
    [
        (DOWN, torch.zeros(96), "the order of its channels is no permutation of 96"),
        (DOWN, ORDER - 1, "the order of its channels is no permutation of 96"),
        ("model.layers.2.mlp.down_proj", ORDER, r"no linear .* those are model\.layers\.\*\.mlp\.down_proj$"),
        ("model.layers.0.self_attn.o_proj", ORDER, "no linear of family llama whose channels can be permuted"),
        ("mlp.down_proj", ORDER, "no linear of family llama whose channels can be permuted"),
    ],
)
def test_what_cannot_be_permuted_is_refused(exact: FolderSource, name: str, order: torch.Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PermutedFfn(exact, {name: order})


def test_an_order_of_another_width_is_refused(exact: FolderSource) -> None:
    source = PermutedFfn(exact, {DOWN: torch.arange(64)})
    with pytest.raises(ConfigError, match=rf"^{DOWN}: an order of 64 channels; expected 96$"):
        source.block(1)
