"""Input transforms of several stages, and of other blocks than 32, through quantizing, a checkpoint and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_model import write_tiny_model
from tests.unit.checkpoint.folders import all_tensors, logits, recipe, windows_for, write
from transformers import AutoModelForCausalLM

from mxrot import transforms
from mxrot.checkpoint import load
from mxrot.errors import CheckpointError, ConfigError
from mxrot.layers import build_apart
from mxrot.models import FAMILIES
from mxrot.quantizing.problems import find_problems
from mxrot.quantizing.run import quantize
from mxrot.recipe import Recipe, load_recipe
from mxrot.transforms import (
    BlockDiagonal,
    HadamardOfWidth,
    HadamardOfWidthSpec,
    Permutation,
    PermutationSpec,
    Sharing,
    SiteSample,
    SiteTransform,
    StageSpec,
    TransformMethod,
)
from mxrot.transforms.base import random_orthogonal


@dataclass(frozen=True)
class Mixed(TransformMethod):
    """A permutation, a Hadamard matrix of the width, and random blocks."""

    name = "mixed"

    def own_specs(self, width: int, sharing: Sharing) -> tuple[StageSpec, ...]:
        return (PermutationSpec(), HadamardOfWidthSpec(), *super().own_specs(width, sharing))

    def fit(self, sample: SiteSample, sharing: Sharing, generator: torch.Generator) -> SiteTransform:
        width = sample.weights.shape[1]
        count = 1 if sharing == "site" else sample.groups
        return SiteTransform(
            (
                Permutation(torch.randperm(width, generator=generator)),
                HadamardOfWidth(),
                BlockDiagonal(random_orthogonal(count, self.block, generator)),
            )
        )


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(transforms.METHODS, Mixed.name, Mixed)


def chosen_by(base: str, transform: TransformMethod, sharing: Sharing) -> Recipe:
    return replace(recipe(base), transform=transform, sharing=sharing)


CASES = {
    "stages a site": ("rtn", Mixed(), "site"),
    "stages a block, smoothed, gptq": ("duquant++-gptq", Mixed(), "block"),
    "hadamard of 64": ("hadamard", transforms.get_transform("hadamard")(block=64), "site"),
    "moments of 16 a block, gptq": ("mxrot", transforms.get_transform("moments")(block=16), "block"),
    "outlier of 64 a block, smoothed, gptq": (
        "duquant++-gptq",
        replace(recipe("duquant++-gptq").transform, block=64),
        "block",
    ),
    "dual of 64 a block, smoothed, gptq": (
        "duquant++-gptq",
        transforms.get_transform("dual")(block=64, steps=8),
        "block",
    ),
}


@pytest.mark.parametrize(("base", "transform", "sharing"), CASES.values(), ids=CASES)
def test_a_checkpoint_computes_what_was_quantized(
    tmp_path: Path, base: str, transform: TransformMethod, sharing: Sharing
) -> None:
    chosen = chosen_by(base, transform, sharing)
    source = write_tiny_model(tmp_path / "source", torch.bfloat16, intermediate_size=128)
    kept = quantize(source, chosen, windows=windows_for(chosen)).model
    assert kept is not None
    write(source, tmp_path / "out", chosen)
    loaded = load(tmp_path / "out", verify=True)
    expected = kept.state_dict()
    for name, value in loaded.state_dict().items():
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name
    assert torch.equal(logits(kept), logits(loaded))
    tensors = all_tensors(tmp_path / "out")
    down = "model.layers.0.mlp.down_proj.layer0_down_input"
    is_each = sharing == "block" and not transform.is_one_for_all
    block = transform.block
    assert tensors[f"{down}.weight"].shape == ((128 // block, block, block) if is_each else (block, block))
    assert (f"{down}.order" in tensors) == (transform.name in ("mixed", "dual"))


@pytest.mark.parametrize("name", ["duquant", "duquant-mxfp4"])
def test_transformers_loads_a_dual_transform(tmp_path: Path, name: str) -> None:
    """Widths of 96 and 160, which blocks of 96 and of 32 divide; the same logits as in memory and as `load` gives."""
    sizes = {"hidden_size": 96, "head_dim": 24, "intermediate_size": 160}
    source = write_tiny_model(tmp_path / "source", torch.bfloat16, **sizes)
    chosen = recipe(name, transform__steps=4)
    kept = quantize(source, chosen, windows=windows_for(chosen)).model
    assert kept is not None
    write(source, tmp_path / "out", chosen)
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(by_transformers), logits(kept))
    assert torch.equal(logits(load(tmp_path / "out")), logits(kept))
    prefix = "model.layers.1.mlp"
    tensors = all_tensors(tmp_path / "out")
    assert tensors[f"{prefix}.gate_proj.layer1_gate_up_input.weight_0"].shape == (96, 96)
    assert tensors[f"{prefix}.down_proj.layer1_down_input.weight"].shape == (32, 32)


def test_the_wide_stages_are_folded_into_the_weights(tmp_path: Path) -> None:
    """In a format of 8 bits the model says what the original says, to a tenth."""
    source = write_tiny_model(tmp_path / "source", torch.float32)
    chosen = chosen_by("rtn", Mixed(), "site").changed(
        {"weights.format": "mxfp8_e4m3", "activations.format": "mxfp8_e4m3"}
    )
    found = quantize(source, chosen).model
    assert found is not None
    expected = logits(AutoModelForCausalLM.from_pretrained(source))
    assert (logits(found) - expected).norm() <= 0.1 * expected.norm()


def test_a_damaged_permutation_is_refused(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source", torch.bfloat16)
    write(source, tmp_path / "out", chosen_by("rtn", Mixed(), "site"))
    name = "model.layers.0.mlp.down_proj.layer0_down_input.order"
    (path,) = (path for path in (tmp_path / "out").glob("*.safetensors") if name in load_file(path))
    tensors = load_file(path)
    tensors[name][3] = tensors[name][4]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layer0_down_input.order: an order that is no permutation"):
        load(tmp_path / "out", verify=False)


def test_a_width_without_a_hadamard_matrix_is_a_problem() -> None:
    from tests.tiny_model import tiny_config

    chosen, family = chosen_by("rtn", Mixed(), "site"), FAMILIES["llama"]
    (problem,) = find_problems(build_apart(tiny_config(intermediate_size=3424)), family, chosen, "here")
    assert isinstance(problem, ConfigError)
    assert str(problem).startswith("model.layers.0.mlp.down_proj: a Hadamard matrix of order 3424 is not known")
    assert not list(find_problems(build_apart(tiny_config(intermediate_size=96)), family, chosen, "here"))


def test_what_tuning_cannot_move_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="tuning moves one block-diagonal stage, and transform mixed is of permut"):
        replace(load_recipe("mxrot-tuned"), transform=Mixed())
