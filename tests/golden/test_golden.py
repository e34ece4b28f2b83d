import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.golden.golden import FILE, RECIPES, golden_digests, golden_model

from mxrot.formats import quantize
from mxrot.recipe import load_recipe
from mxrot.transforms import SiteSample, generator_for


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_bit_of_a_checkpoint_has_changed(tmp_path: Path, recipe: str) -> None:
    expected = json.loads(FILE.read_text())[recipe]
    found = golden_digests(tmp_path, recipe)
    changed = sorted(name for name, _ in expected.items() ^ found.items())
    assert not changed, (
        f"recipe {recipe} gives other bits in {', '.join(changed)}. If that is meant, write it under Numerics in "
        "CHANGELOG.md (what changed, why, by how much), then run `python -m tests.golden.golden`."
    )


def test_no_golden_weight_lies_near_a_tie(tmp_path: Path) -> None:
    """Nor near zero, where its sign would be chance: moved by far more than float64 sums differ, each code stays."""
    recipe = load_recipe("hadamard")
    quantizer = recipe.weights.quantizer()
    tensors = load_file(golden_model(tmp_path / "source") / "model.safetensors")
    for name in (name for name in tensors if name.endswith("proj.weight")):
        weight = tensors[name].double()
        transform = recipe.transform.fit(SiteSample(weight, 32), recipe.sharing, generator_for(0, name)).as_applied()
        folded = transform.fold(weight)
        margin = 1e-12 * folded.unflatten(-1, (-1, 32)).norm(dim=-1).repeat_interleave(32, dim=-1)
        expected = quantize(folded, quantizer.format, quantizer.rule)
        for moved in (folded - margin, folded + margin):
            found = quantize(moved, quantizer.format, quantizer.rule)
            assert torch.equal(found.codes, expected.codes), name
            assert torch.equal(found.scales.stored, expected.scales.stored), name
