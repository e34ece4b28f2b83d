"""Norm gains folded away, and a rotation of the residual stream merged into the weights.

In float64 both are exact but for some thousand roundings of 2**-53, each of which can grow by what follows it:
1e-12 beside the largest logit. A weight in float32 is off by 2**-24 once.
"""

from pathlib import Path

import pytest
import torch
from tests.tiny_model import write_tiny_model
from tests.unit.surgery.changed_sources import logits, off_by, rotation, write_with_biases

from mxrot.errors import ConfigError, NumericsError
from mxrot.models import FolderSource
from mxrot.surgery import FoldedNorms, Rotated, Untied

EXACT = 1e-12
NORM = "input_layernorm.weight"


@pytest.fixture
def exact(tmp_path: Path) -> FolderSource:
    return FolderSource(write_with_biases(tmp_path / "exact"))


def test_a_folded_model_is_the_same_function(exact: FolderSource) -> None:
    source = FoldedNorms(exact)
    assert off_by(logits(source), logits(exact)) < EXACT
    assert (source.block(1)[NORM] == 1).all() and (source.outer()["model.norm.weight"] == 1).all()
    assert not (exact.block(1)[NORM] == 1).any()


def test_a_rotated_model_is_the_same_function(exact: FolderSource) -> None:
    """Another matrix gives other weights, and the same logits."""
    expected = logits(exact)
    sources = [Rotated(exact, rotation(seed=seed)) for seed in range(2)]
    for source in sources:
        assert off_by(logits(source), expected) < EXACT
    one, other = (source.block(0)["mlp.down_proj.weight"] for source in sources)
    assert off_by(one, other) > 0.1


def test_a_matrix_that_is_missing_on_one_side_is_seen(exact: FolderSource) -> None:
    """Else the tests above would see nothing."""
    for name in ("self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.bias", "mlp.up_proj.weight"):

        class Forgotten(Rotated):
            def changed_block(self, index, tensors):  # type: ignore[no-untyped-def]
                return super().changed_block(index, tensors) | {name: tensors[name]}  # noqa: B023

        assert off_by(logits(Forgotten(exact, rotation())), logits(exact)) > 1e-4


def test_rotations_and_folding_follow_each_other(exact: FolderSource) -> None:
    one, other = rotation(), rotation(seed=1)
    both = Rotated(Rotated(FoldedNorms(exact), one), other)
    at_once = Rotated(exact, one @ other)
    for name, tensor in at_once.block(0).items():
        torch.testing.assert_close(both.block(0)[name], tensor, rtol=0, atol=1e-13)
    assert [change.split()[0] for change in both.changes] == ["norms", "rotated", "rotated"]
    assert both.changes[1] != both.changes[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_each_weight_is_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    inner = FolderSource(write_with_biases(tmp_path / "stored", dtype))
    matrix, before = rotation(), inner.block(1)
    after = Rotated(inner, matrix).block(1)
    gain, up, down = (before[name].double() for name in (NORM, "self_attn.q_proj.weight", "mlp.down_proj.weight"))
    assert torch.equal(after["self_attn.q_proj.weight"], ((up * gain) @ matrix).to(dtype))
    assert torch.equal(after["mlp.down_proj.weight"], (matrix.T @ down).to(dtype))
    outer = Rotated(inner, matrix).outer()
    assert torch.equal(
        outer["model.embed_tokens.weight"], (inner.outer()["model.embed_tokens.weight"].double() @ matrix).to(dtype)
    )
    for name in ("self_attn.q_proj.bias", "mlp.up_proj.bias"):
        assert torch.equal(after[name], before[name])
    assert all(tensor.dtype == dtype for tensor in (*after.values(), *outer.values()))
    # Two roundings of each of the weights on a path, and sums of hundreds of them with random signs.
    assert off_by(logits(Rotated(inner, matrix)), logits(inner)) < 64 * torch.finfo(dtype).eps


def test_a_tied_head_is_untied_first(tmp_path: Path) -> None:
    tied = FolderSource(write_tiny_model(tmp_path / "tied", torch.float64, tie_word_embeddings=True))
    for change in (FoldedNorms, lambda source: Rotated(source, rotation())):
        with pytest.raises(ConfigError, match=r"the head is the embedding, .* untie it first \(Untied\)$"):
            change(tied)
    assert off_by(logits(Rotated(Untied(tied), rotation())), logits(tied)) < EXACT


def test_what_is_no_rotation_is_refused(exact: FolderSource) -> None:
    with pytest.raises(ConfigError, match=r"a rotation of shape \[32, 32\]; expected \[64, 64\]$"):
        Rotated(exact, rotation(32))
    for wrong in (2 * rotation(), rotation().float(), torch.full((64, 64), torch.nan)):
        with pytest.raises(ConfigError, match=r"a rotation that is off by .* from an orthogonal matrix"):
            Rotated(exact, wrong)


def test_a_weight_that_leaves_its_type_is_named(tmp_path: Path) -> None:
    inner = FolderSource(write_tiny_model(tmp_path / "half"))
    tensors = inner.block(0)
    tensors[NORM] = torch.full_like(tensors[NORM], 6e4)
    tensors["self_attn.k_proj.weight"] = torch.full_like(tensors["self_attn.k_proj.weight"], 2)
    with pytest.raises(
        NumericsError, match=r"^model\.layers\.0\.self_attn\.k_proj\.weight: 1\.2e\+05 is too large for "
    ):
        FoldedNorms(inner).changed_block(0, tensors)


def test_a_large_embedding_is_rotated_piece_by_piece(exact: FolderSource, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Rotated(exact, rotation()).outer()
    monkeypatch.setattr("mxrot.surgery.fold_norms.ROWS", 100)
    for name, tensor in Rotated(exact, rotation()).outer().items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-14, atol=1e-15)
