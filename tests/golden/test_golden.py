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
    """A millionth of what a code decides about, and a thousand times what float64 sums may differ by."""
    recipe = load_recipe("hadamard")
    quantizer = recipe.weights.quantizer()
    tensors = load_file(golden_model(tmp_path / "source") / "model.safetensors")
    for name in (name for name in tensors if name.endswith("proj.weight")):
        weight = tensors[name].double()
        transform = recipe.transform.fit(SiteSample(weight, 32), recipe.sharing, generator_for(0, name)).as_applied()
        folded = transform.fold(weight)
        largest = folded.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True)
        codes = []
        for push in (-1e-10, 0.0, 1e-10):
            moved = folded.unflatten(-1, (-1, 32)) + push * largest * folded.unflatten(-1, (-1, 32)).sign()
            pushed = quantize(moved.flatten(-2), quantizer.format, quantizer.rule)
            codes.append((pushed.codes, pushed.scales.stored))
        assert all(torch.equal(*pair) for pair in zip(codes[0], codes[1], strict=True))
        assert all(torch.equal(*pair) for pair in zip(codes[2], codes[1], strict=True))
