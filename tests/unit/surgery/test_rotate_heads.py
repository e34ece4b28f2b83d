"""Value heads rotated, merged into v_proj and o_proj; tolerances as in test_rotate.py."""

from pathlib import Path

import pytest
import torch
from tests.unit.surgery.changed_sources import logits, off_by, rotation, write_with_biases
from torch import Tensor

from mxrot.errors import ConfigError
from mxrot.models import FolderSource
from mxrot.surgery import Rotated, RotatedHeads
from mxrot.transforms.base import random_orthogonal

EXACT = 1e-12
VALUES, READER = "self_attn.v_proj", "self_attn.o_proj"


@pytest.fixture
def exact(tmp_path: Path) -> FolderSource:
    return FolderSource(write_with_biases(tmp_path / "exact"))


def matrices(seed: int = 0, count: int = 2, width: int = 16) -> Tensor:
    return random_orthogonal(count, width, torch.Generator().manual_seed(seed))


def test_rotated_heads_are_the_same_function(exact: FolderSource) -> None:
    """Four query heads of two value heads, with biases; blocks have matrices of their own."""
    source = RotatedHeads(exact, matrices())
    assert off_by(logits(source), logits(exact)) < EXACT
    for index in range(2):
        before, after = exact.block(index), source.block(index)
        changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
        assert changed == {f"{VALUES}.weight", f"{VALUES}.bias", f"{READER}.weight"}
    assert source.outer().keys() == exact.outer().keys()
    assert source.config_changes == {}


def test_a_side_that_is_left_out_is_seen(exact: FolderSource) -> None:
    """Else the test above would see nothing."""
    for name in (f"{VALUES}.weight", f"{VALUES}.bias", f"{READER}.weight"):

        class Forgotten(RotatedHeads):
            def changed_block(self, index, tensors):  # type: ignore[no-untyped-def]
                return super().changed_block(index, tensors) | {name: tensors[name]}  # noqa: B023

        assert off_by(logits(Forgotten(exact, matrices())), logits(exact)) > 1e-4


def test_each_row_and_column_by_hand(exact: FolderSource) -> None:
    """Value head 1 is rows 16 to 31 of v_proj, and query head 3 reads it in columns 48 to 63 of o_proj."""
    given = matrices()
    before, after = exact.block(1), RotatedHeads(exact, given).block(1)
    rows, columns = slice(16, 32), slice(48, 64)
    expected = given[1].T @ before[f"{VALUES}.weight"][rows]
    torch.testing.assert_close(after[f"{VALUES}.weight"][rows], expected, rtol=0, atol=1e-14)
    expected = before[f"{READER}.weight"][:, columns] @ given[1]
    torch.testing.assert_close(after[f"{READER}.weight"][:, columns], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_with_the_residual_stream_each_weight_is_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    """Both weights of the heads are changed by both rotations."""
    inner = FolderSource(write_with_biases(tmp_path / "stored", dtype))
    R, heads = rotation(), matrices()
    before = inner.block(0)
    after = Rotated(RotatedHeads(inner, heads, rounds=False), R).block(0)
    gain = before["input_layernorm.weight"].double()
    values = (before[f"{VALUES}.weight"].double().unflatten(0, (2, 16)).mT @ heads[0]).mT.flatten(0, 1)
    assert_rounded_once(after[f"{VALUES}.weight"], (values * gain) @ R, dtype)
    columns = (before[f"{READER}.weight"].double().unflatten(1, (4, 16)) @ heads[0]).flatten(1)
    assert_rounded_once(after[f"{READER}.weight"], R.T @ columns, dtype)
    assert all(tensor.dtype == dtype for tensor in after.values())
    twice = Rotated(RotatedHeads(inner, heads), R).block(0)
    assert not torch.equal(twice[f"{READER}.weight"], after[f"{READER}.weight"])


def assert_rounded_once(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Half a unit of the type, and what float64 itself loses."""
    nearest = exact.to(dtype)
    differ = found != nearest
    assert differ.double().mean() < 1e-3  # ties within float64's own rounding
    assert torch.equal(found[~differ], nearest[~differ])


def test_what_are_no_rotations_are_refused(exact: FolderSource) -> None:
    with pytest.raises(ConfigError, match=r"value heads: a rotation of shape \[2, 8, 8\]; expected \[2, 16, 16\]$"):
        RotatedHeads(exact, matrices(width=8))
    with pytest.raises(ConfigError, match=r"value heads: a rotation of shape \[1, 16, 16\]"):
        RotatedHeads(exact, matrices(count=1))
    with pytest.raises(ConfigError, match=r"value heads: a rotation that is off by .* from an orthogonal matrix"):
        RotatedHeads(exact, matrices() * torch.tensor([1.0, 2.0])[:, None, None])
