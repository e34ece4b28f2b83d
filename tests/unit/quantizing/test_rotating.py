"""Rotations of a recipe: drawn from the seed, merged before anything is quantized, refused before a weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
from tests.contracts.tiny_configs import config_of
from tests.tiny_model import tiny_config, write_tiny_model
from tests.unit.surgery.changed_sources import off_by
from torch import Tensor

from mxrot.errors import ConfigError
from mxrot.layers import build_apart
from mxrot.models import FAMILIES, FolderSource
from mxrot.quantizing import quantize
from mxrot.quantizing.problems import find_problems
from mxrot.quantizing.rotating import config_after, drawn_rotations, rotated_source
from mxrot.recipe import Recipe, load_recipe
from mxrot.surgery import Rotated, RotatedHeads, Untied
from mxrot.transforms import generator_for
from mxrot.transforms.orders import hadamard_factor


def rotating(**keys: Any) -> Recipe:
    return load_recipe("rtn").changed({f"rotation.{key}": value for key, value in keys.items()})


@pytest.fixture
def tied(tmp_path: Path) -> FolderSource:
    return FolderSource(write_tiny_model(tmp_path / "tied", tie_word_embeddings=True))


def problems(recipe: Recipe, **changes: Any) -> list[str]:
    found = find_problems(build_apart(tiny_config(**changes)), FAMILIES["llama"], recipe, "here")
    return [str(problem) for problem in found]


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_matrices_follow_from_the_seed(tied: FolderSource, kind: str) -> None:
    recipe = rotating(residual=kind, value_heads=kind)
    one, again, other = (drawn_rotations(tied.config, recipe, seed, "cpu") for seed in (0, 0, 1))
    for key, shape in (("residual", (64, 64)), ("value_heads", (2, 16, 16))):
        found: Tensor = getattr(one, key)
        assert found.shape == shape and found.dtype == torch.float64
        assert torch.equal(found, getattr(again, key)) and not torch.equal(found, getattr(other, key))
        assert (found.mT @ found - torch.eye(shape[-1])).abs().max() < 1e-13
    heads = one.value_heads
    assert heads is not None and not torch.equal(heads[0], heads[1])


def test_a_random_hadamard_matrix_is_one_with_signs_on_its_rows() -> None:
    """12 = 11 + 1 (Paley); the stream has 12 * 4 channels."""
    config = tiny_config(hidden_size=48, head_dim=12)
    found = drawn_rotations(config, rotating(residual="hadamard", value_heads="hadamard"), 3, "cpu")
    assert found.residual is not None and found.value_heads is not None
    torch.testing.assert_close(
        found.residual.abs(), torch.full((48, 48), 48**-0.5, dtype=torch.float64), rtol=1e-14, atol=0
    )
    signs = torch.randint(0, 2, (12,), generator=generator_for(3, "rotation of the value heads of block 1")) * 2 - 1
    expected = signs[:, None] * hadamard_factor(12) * 12**-0.5
    torch.testing.assert_close(found.value_heads[1], expected, rtol=1e-14, atol=0)


def test_without_rotations_the_source_is_the_very_same(tied: FolderSource) -> None:
    recipe = load_recipe("rtn")
    assert rotated_source(tied, drawn_rotations(tied.config, recipe, 0, "cpu")) is tied
    assert config_after(tied.config, recipe) is tied.config
    assert quantize(tied, recipe).source is tied


def test_the_head_gets_weights_of_its_own_only_where_it_must(tied: FolderSource, tmp_path: Path) -> None:
    free = FolderSource(write_tiny_model(tmp_path / "free"))
    for source, recipe, kinds in (
        (tied, rotating(residual="hadamard"), [Untied, Rotated]),
        (tied, rotating(residual="hadamard", value_heads="hadamard"), [Untied, RotatedHeads, Rotated]),
        (tied, rotating(value_heads="hadamard"), [RotatedHeads]),
        (free, rotating(residual="hadamard"), [Rotated]),
    ):
        found: Any = rotated_source(source, drawn_rotations(source.config, recipe, 0, "cpu"))
        assert found.config.tie_word_embeddings == config_after(source.config, recipe).tie_word_embeddings
        for kind in reversed(kinds):
            assert type(found) is kind
            found = found.inner
        assert found is source
        result = quantize(source, recipe)
        assert result.model is not None and len(result.source.changes) == len(kinds)
        assert ("lm_head.weight" in dict(result.model.named_parameters())) == (result.model.config is not tied.config)


def test_what_is_quantized_is_the_rotated_model(tied: FolderSource) -> None:
    """Codes are those of its weights, and what is no code is of it, too."""
    recipe = rotating(residual="orthogonal", value_heads="hadamard")
    result = quantize(tied, recipe, seed=5)
    assert result.model is not None
    linear: Any = result.model.model.layers[1].mlp.gate_proj
    expected = result.source.block(1)["mlp.gate_proj.weight"].float()
    assert torch.equal(linear.dequantized_weight(), recipe.weights.quantizer()(expected))
    assert off_by(tied.block(1)["mlp.gate_proj.weight"].float(), expected) > 0.5
    outer = result.source.outer()
    assert torch.equal(result.model.lm_head.weight, outer["lm_head.weight"].float())
    assert torch.equal(result.model.model.embed_tokens.weight, outer["model.embed_tokens.weight"].float())
    assert (result.model.model.norm.weight == 1).all()


@pytest.mark.parametrize("hidden", [13696, 27392])
def test_a_size_without_a_hadamard_matrix_is_named_with_what_to_do(hidden: int) -> None:
    config = config_of(FAMILIES["llama"], hidden_size=hidden, head_dim=16)
    model = build_apart(config)
    found = [str(one) for one in find_problems(model, FAMILIES["llama"], rotating(residual="hadamard"), "here")]
    assert len(found) == 1
    assert f"rotation.residual: a Hadamard matrix of order {hidden} is not known" in found[0]
    assert 'take "orthogonal", or Hadamard matrices over blocks of 128' in found[0]
    assert not list(find_problems(model, FAMILIES["llama"], rotating(residual="orthogonal"), "here"))


@pytest.mark.parametrize("inner", [13696, 27392])
def test_quarot_before_down_is_refused_with_what_to_do(inner: int) -> None:
    """In Baichuan 2 and Qwen 1.8B; blocks of 128 are taken there instead."""
    family, model = FAMILIES["llama"], build_apart(tiny_config(intermediate_size=inner))
    quarot = load_recipe("quarot")
    (problem,) = find_problems(model, family, quarot, "here")
    assert str(problem).startswith(f"model.layers.0.mlp.down_proj: a Hadamard matrix of order {inner} is not known")
    assert 'take Hadamard matrices over blocks of 128 there (method = "hadamard", block = 128)' in str(problem)
    table = tomllib.loads(quarot.to_toml())
    table["override"][0]["transform"] = {"method": "hadamard", "block": 128}
    assert not list(find_problems(model, family, Recipe.from_table(table, "blocks"), "here"))


def test_a_head_width_without_a_hadamard_matrix_is_refused(tmp_path: Path) -> None:
    odd = {"head_dim": 36 * 4 + 28}  # 172
    found = problems(rotating(value_heads="hadamard"), **odd)
    assert any("rotation.value_heads: a Hadamard matrix of order 172 is not known" in one for one in found)
    source = FolderSource(write_tiny_model(tmp_path / "odd", head_dim=88 + 4))
    with pytest.raises(ConfigError, match=r"rotation\.value_heads: a Hadamard matrix of order 92 is not known"):
        quantize(source, rotating(value_heads="hadamard"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"residual": "none"}, r'rotation: residual and value_heads are both "none"'),
        ({"residual": "hadamrad"}, r"rotation\.residual: 'hadamrad' is not one of"),
        ({"residual": "hadamard", "steps": -1}, r"rotation: steps must not be negative, got -1"),
        ({"residual": "hadamard", "rate": 0}, r"rotation: rate must be positive and finite, got 0"),
        ({"residual": "hadamard", "batch_windows": 0}, r"rotation: batch_windows must be at least 1, got 0"),
        ({"residuals": "hadamard"}, r"rotation: unknown key 'residuals'"),
    ],
    ids=str,
)
def test_what_is_no_rotation_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rotating(**keys)


def test_a_rotation_is_part_of_the_recipe() -> None:
    recipe = rotating(residual="hadamard", value_heads="orthogonal")
    assert Recipe.from_toml(recipe.to_toml(), "again") == recipe
    assert recipe.rotation is not None
    assert recipe.rotation.spelled == "the residual stream (hadamard) and the value heads (orthogonal)"
    assert recipe.changed({"rotation": "none"}) == load_recipe("rtn")
    assert recipe.is_data_free
