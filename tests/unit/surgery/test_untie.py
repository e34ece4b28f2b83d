"""A head that is a copy of the embedding."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_model import write_tiny_model
from tests.unit.surgery.changed_sources import logits

from mxrot.models import FolderSource, build_skeleton
from mxrot.surgery import Untied

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def tied(tmp_path: Path) -> FolderSource:
    return FolderSource(write_tiny_model(tmp_path / "tied", tie_word_embeddings=True))


def test_the_head_is_a_copy_and_the_config_says_so(tied: FolderSource) -> None:
    source = Untied(tied)
    assert HEAD not in tied.outer()
    outer = source.outer()
    assert torch.equal(outer[HEAD], outer[EMBEDDING]) and outer[HEAD].data_ptr() != outer[EMBEDDING].data_ptr()
    assert (tied.config.tie_word_embeddings, source.config.tie_word_embeddings) == (True, False)
    assert source.config_changes == {"tie_word_embeddings": False} and source.changes == ("untied",)


def test_logits_are_the_same_bits(tied: FolderSource) -> None:
    assert torch.equal(logits(Untied(tied)), logits(tied))


def test_nothing_is_missing_of_it(tied: FolderSource) -> None:
    assert list(tied.problems(build_skeleton(Untied(tied).config)))
    assert not list(Untied(tied).problems(build_skeleton(Untied(tied).config)))


def test_the_copy_has_the_type_of_the_embedding(tied: FolderSource) -> None:
    path = tied.folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {EMBEDDING: tensors[EMBEDDING].float()}, path, {"format": "pt"})
    source = Untied(FolderSource(tied.folder))
    assert source.types == {HEAD: torch.float32, EMBEDDING: torch.float32}
    assert source.outer()[HEAD].dtype == torch.float32 and source.dtype == torch.float16


def test_a_head_of_its_own_stays(tmp_path: Path) -> None:
    inner = FolderSource(write_tiny_model(tmp_path / "apart"))
    assert torch.equal(Untied(inner).outer()[HEAD], inner.outer()[HEAD])
    assert not torch.equal(inner.outer()[HEAD], inner.outer()[EMBEDDING])
