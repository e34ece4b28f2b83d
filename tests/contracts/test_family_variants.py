"""Families whose blocks follow from the config, with other configs than the tiny ones of the other tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tests.contracts.test_families as owed
import torch
from tests.contracts import test_family_checkpoints as checkpoints
from tests.contracts import test_family_generation as generation
from tests.contracts import test_family_sources as sources
from tests.contracts.tiny_configs import CHANGED, auto_class, config_of
from tests.tiny_model import write_tokenizer

from mxrot.models import FAMILIES, Family, find_family

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "experts of all channels": ("nemotron_h", {"moe_latent_size": None}),
    "no experts": ("nemotron_h", {"layer_types": ["linear_attention", "mlp", "full_attention"]}),
    "no experts beside the MLP": ("granitemoehybrid", {"num_local_experts": 0}),
    "no states": ("granitemoehybrid", {"num_local_experts": 0, "layer_types": ["full_attention"] * 2}),
    "no attention": ("bamba", {"attn_layer_indices": None, "use_cache": False}),
    "experts everywhere": ("lfm2_moe", {"num_dense_layers": 0}),
}


@pytest.fixture(params=VARIANTS)
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Family]:
    """As its config has it, which the other tests take while it is here."""
    name, changes = VARIANTS[request.param]
    monkeypatch.setitem(CHANGED, name, changes)
    yield find_family(config_of(FAMILIES[name]), name)
    owed.seen_by_modules.cache_clear()


@pytest.fixture
def folders(family: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As the other tests have them, of this one alone."""
    torch.manual_seed(0)
    model = auto_class(family).from_config(config_of(family))
    owed.spread_gains(model, family)
    folder = tmp_path_factory.mktemp(family.name)
    model.half().save_pretrained(folder)
    write_tokenizer(folder)
    return {family.name: folder}


def test_it_is_no_tiny_family_of_the_other_tests(family: Family) -> None:
    assert family != owed.TINY_FAMILIES[family.name]


def test_its_blocks_owe_what_those_of_others_do(family: Family) -> None:
    owed.test_sites_hold_every_linear_of_a_block_once(family)
    owed.test_site_names_can_be_part_of_a_tensor_name(family)
    for number in owed.numbers_of(family):
        owed.test_the_linears_of_a_site_read_one_tensor_and_sites_do_not_share(family, number)
        owed.test_sites_are_in_the_order_in_which_they_compute(family, number)
        owed.test_the_norms_and_producers_that_it_names_exist(family, number)
        owed.test_a_gain_or_a_row_of_the_producer_scales_its_own_channels(family, number)


def test_everything_folds_away_in_float64(family: Family, tmp_path: Path) -> None:
    owed.test_scales_and_transforms_fold_away_in_float64(family, False)
    sources.test_a_rotation_of_the_residual_stream_changes_nothing(family, tmp_path / "rotated")
    sources.test_a_permutation_of_channels_changes_nothing(family, tmp_path / "permuted")


@pytest.mark.parametrize("name", ["rtn", "duquant++", "mxrot", *checkpoints.CACHES])
def test_what_is_loaded_is_what_was_quantized(
    folders: dict[str, Path], tmp_path: Path, family: Family, name: str
) -> None:
    checkpoints.test_what_is_loaded_is_what_was_quantized(folders, tmp_path, family, name)


def test_a_cache_changes_nothing(folders: dict[str, Path], tmp_path: Path, family: Family) -> None:
    """transformers 5.23 has no cache for models without attention."""
    if not any(family.attends(index) for index in owed.numbers_of(family)):
        with pytest.raises(ValueError, match="can only be called on Attention layers"):
            generation.by_pieces(generation.model_of(family), [30, 10])
        return
    generation.test_a_cache_changes_no_logits(family)
    generation.test_a_cache_takes_what_is_counted(family)
    generation.test_a_checkpoint_writes_the_same_with_a_cache(folders, family, tmp_path)


@pytest.mark.parametrize("name", ["rtn", "mxrot"])
def test_a_plan_counts_what_is_there(folders: dict[str, Path], tmp_path: Path, family: Family, name: str) -> None:
    generation.test_a_plan_counts_what_is_there(folders, family, tmp_path, name)
