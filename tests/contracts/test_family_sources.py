"""Every family with its weights changed on the way in: a rotation, a permutation, an untied head."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.contracts.test_families import TINY_FAMILIES, each, numbers_of, spread_gains
from tests.contracts.tiny_configs import auto_class, config_of
from tests.unit.surgery.changed_sources import logits, off_by, rotation

from mxrot.errors import ConfigError
from mxrot.models import Family, FolderSource, Source, WeightFiles, value_heads
from mxrot.quantizing import quantize
from mxrot.quantizing.rotating import Rotations, drawn_rotations, rotated_source
from mxrot.recipe import load_recipe
from mxrot.surgery import PermutedFfn, PermutedHeads, Rotated, RotatedHeads, Untied, permutable_linears

IDS = torch.arange(40)[None]
NAMING = {name: family for name, family in TINY_FAMILIES.items() if family.names_values}
each_naming_values = pytest.mark.parametrize("family", NAMING.values(), ids=NAMING)
TURNED = {name: family for name, family in TINY_FAMILIES.items() if family.is_rotatable or family.names_values}
each_turned = pytest.mark.parametrize("family", TURNED.values(), ids=TURNED)
TOLERANCE = 1e-12
"""Some thousand roundings of float64."""


def may_tie(family: Family) -> bool:
    """May the head be the embedding?"""
    return ("tie_word_embeddings", False) not in family.holds_for


TYING = {name: family for name, family in TINY_FAMILIES.items() if may_tie(family)}
each_tying = pytest.mark.parametrize("family", TYING.values(), ids=TYING)


def exact_folder(folder: Path, family: Family, **changes: object) -> FolderSource:
    """A tiny model in float64, with gains and biases that count."""
    torch.manual_seed(0)
    model = auto_class(family).from_config(config_of(family, **changes)).double()
    spread_gains(model, family)
    model.save_pretrained(folder)
    return FolderSource(folder)


@each_tying
def test_a_folder_without_its_head_is_read(family: Family, tmp_path: Path) -> None:
    """As transformers writes the body of a model: no prefix, and no head, which is the embedding."""
    whole = exact_folder(tmp_path / "whole", family, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    assert f"{family.head}.weight" not in tensors
    (tmp_path / "flat").mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "flat")
    if family.beside is None:
        flat = {name.removeprefix(f"{family.body}."): tensor for name, tensor in tensors.items()}
    else:
        flat = {family.beside.model_name(name).removeprefix("model."): tensor for name, tensor in tensors.items()}
    assert not flat.keys() & {name for name in tensors if name.startswith("model.")}
    save_file(flat, tmp_path / "flat" / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(FolderSource(tmp_path / "flat"), IDS), logits(whole, IDS))


@each
def test_a_rotation_of_the_residual_stream_changes_nothing(family: Family, tmp_path: Path) -> None:
    """Or is refused."""
    source = exact_folder(tmp_path, family, tie_word_embeddings=may_tie(family))
    if not family.is_rotatable:
        assert family.rotation_obstacle
        reason = rf"residual stream of family {family.name} can be merged into the weights: {family.rotation_obstacle};"
        with pytest.raises(ConfigError, match=reason):
            Rotated(Untied(source) if may_tie(family) else source, rotation())
        return
    rotated = Rotated(Untied(source) if may_tie(family) else source, rotation())
    assert off_by(logits(rotated, IDS), logits(source, IDS)) < TOLERANCE
    assert off_by(rotated.outer()[f"{family.head}.weight"], source.outer()[f"{family.embedding}.weight"]) > 0.1


@each_turned
@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_the_rotations_of_a_recipe_change_nothing(family: Family, kind: str, tmp_path: Path) -> None:
    """Of the value heads, and of the residual stream, in the families that take them."""
    source = exact_folder(tmp_path, family, tie_word_embeddings=may_tie(family))
    recipe = load_recipe("rtn")
    if family.names_values:
        recipe = recipe.changed({"rotation.value_heads": kind})
    if family.is_rotatable:
        recipe = recipe.changed({"rotation.residual": kind})
    if not family.names_values:
        with pytest.raises(ConfigError, match=f"and family {family.name} names no linear that makes them, head after"):
            quantize(source, recipe.changed({"rotation.value_heads": kind}))
    drawn = drawn_rotations(source.config, recipe, 0, "cpu")
    rotated = rotated_source(source, drawn)
    assert off_by(logits(rotated, IDS), logits(source, IDS)) < TOLERANCE
    number = next(index for index in reversed(numbers_of(family)) if family.attends(index))
    before, after = source.block(number), rotated.block(number)
    if not family.names_values:
        read = next(site for site in family.sites_of(number) if site.norm is not None).linears[0]
        assert off_by(after[f"{read}.weight"], before[f"{read}.weight"]) > 0.1
        return
    for name in (family.values, family.values_read_by):
        assert off_by(after[f"{name}.weight"], before[f"{name}.weight"]) > 0.1
    half = Rotations(value_heads=drawn.value_heads)
    assert off_by(logits(rotated_source(source, half), IDS), logits(source, IDS)) < TOLERANCE


@each_naming_values
def test_values_are_rotated_on_both_sides(family: Family, tmp_path: Path) -> None:
    """Else the test above would see nothing."""
    source = exact_folder(tmp_path, family)
    matrices = torch.stack([rotation(16, seed) for seed in numbers_of(family)])
    for linear in (family.values, family.values_read_by):

        class Forgotten(RotatedHeads):
            def changed_block(self, index, tensors):  # type: ignore[no-untyped-def]
                name = f"{linear}.weight"  # noqa: B023
                kept = {name: tensors[name]} if family.attends(index) else {}
                return super().changed_block(index, tensors) | kept

        assert off_by(logits(Forgotten(source, matrices), IDS), logits(source, IDS)) > 1e-4


@each
def test_a_recipe_that_rotates_is_refused_before_a_weight_is_read(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = exact_folder(tmp_path, family)
    monkeypatch.setattr(WeightFiles, "read_all", None)  # who calls it fails otherwise
    recipe = load_recipe("rtn").changed({"rotation.residual": "hadamard"})
    if family.is_rotatable:
        with pytest.raises(TypeError):
            quantize(source, recipe)
    else:
        with pytest.raises(ConfigError, match=rf"family {family.name} can be .* {family.rotation_obstacle}; take a"):
            quantize(source, recipe)


@each
def test_a_permutation_of_channels_changes_nothing(family: Family, tmp_path: Path) -> None:
    """Inner ones of every MLP, or of every expert, and those of each value head, where they are named."""
    source = exact_folder(tmp_path, family)
    draws = torch.Generator().manual_seed(0)
    inner = {
        f"{family.block_prefix(index)}.{name}": source.block(index)[f"{name}.weight"].shape[1]
        for index in numbers_of(family)
        for name in permutable_linears(family, index)
    }
    ffn = {name: torch.randperm(width, generator=draws) for name, width in inner.items()}
    assert ffn
    count, width = value_heads(source.config)
    blocks = len(numbers_of(family))
    heads = torch.stack([torch.randperm(width, generator=draws) for _ in range(blocks * count)])
    heads = heads.unflatten(0, (blocks, count))
    expected = logits(source, IDS)
    permuted: list[Source] = [PermutedFfn(source, ffn)]
    if family.names_values:
        permuted += [PermutedHeads(source, heads), PermutedHeads(permuted[0], heads)]
    for one in permuted:
        assert off_by(logits(one, IDS), expected) < TOLERANCE
    for index in numbers_of(family):
        attends = family.names_values and family.attends(index)
        names = [*permutable_linears(family, index), *((family.values, family.values_read_by) if attends else ())]
        changed, before = permuted[-1].block(index), source.block(index)
        assert not any(torch.equal(changed[f"{name}.weight"], before[f"{name}.weight"]) for name in names)


@each
def test_the_permutations_of_a_recipe_change_nothing(family: Family, tmp_path: Path) -> None:
    """As they are found: blocks of 8, of which a tiny head has two."""
    source = exact_folder(tmp_path, family)
    recipe = load_recipe("hadamard").changed(
        {
            "transform.block": 8,
            "permutation.ffn": "correlated",
            "permutation.value_heads": "correlated",
            "calibration.seq_len": 40,
        }
    )
    windows = torch.randint(2, 50, (4, 40), generator=torch.Generator().manual_seed(0))
    found = quantize(source, recipe, windows=windows).source
    expected = ["MLP permuted", *(["value heads permuted"] if family.names_values else [])]
    assert [change.split(" by ")[0] for change in found.changes] == expected
    assert off_by(logits(found, IDS), logits(source, IDS)) < TOLERANCE


def test_some_families_can_be_rotated_and_some_cannot() -> None:
    assert {family.is_rotatable for family in TINY_FAMILIES.values()} == {True, False}
