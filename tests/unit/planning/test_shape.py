"""Sizes from the config are those of the checkpoint that is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny_model import EXPERT_MODELS, tiny_config, write_tiny_mixture, write_tiny_model
from tests.unit.checkpoint.folders import recipe, write
from tests.unit.planning.shapes import LLAMA_3_8B, run_of

from mxrot.models import read_config
from mxrot.quantizing.rotating import config_after
from mxrot.recipe import Recipe


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("source") / "tiny")


@pytest.mark.parametrize(
    "chosen",
    [
        recipe("rtn"),
        recipe("rtn", ignore=["down_proj", "model.layers.1.self_attn.*"]),
        recipe("hadamard"),
        recipe("smoothquant", transform__sharing="block"),
        recipe("duquant++"),
        recipe("duquant++", transform__sharing="block"),
        recipe("rtn", head__format="mxfp8_e4m3"),
        recipe("hadamard", head__format="mxfp4", head__inputs="mxfp4", head__transform="hadamard"),
    ],
    ids=lambda chosen: f"{chosen.name} {chosen.sharing} {len(chosen.ignore)} {chosen.head and chosen.head.format}",
)
@pytest.mark.parametrize("tied", [False, True])
def test_the_size_is_that_of_the_written_checkpoint(source: Path, tmp_path: Path, chosen: Recipe, tied: bool) -> None:
    folder = write_tiny_model(tmp_path / "tied", tie_word_embeddings=True) if tied else source
    size = write(folder, tmp_path / "out", chosen)["size"]
    after = run_of(config_after(read_config(folder), chosen), chosen, 6, 24).shape.size_after(torch.float16)
    assert after.as_table() | {"bits_per_weight": after.bits_per_weight, "total_bytes": after.total_bytes} == size
    assert (after.bits_per_weight == 4.25) == (not chosen.ignore)


def test_sites_and_counts_of_llama_3_8b() -> None:
    shape = run_of(LLAMA_3_8B, recipe("mxrot"), 1, 2).shape
    found = {site.site.name: (site.rows, site.inputs, count) for site, count in shape.site_counts()}
    assert found == {
        "qkv": ((4096, 1024, 1024), 4096, 32),
        "o": ((4096,), 4096, 32),
        "gate_up": ((14336, 14336), 4096, 32),
        "down": ((4096,), 14336, 32),
    }
    assert (shape.parameters, shape.quantized_weights) == (8030261248, 6979321856)
    after = shape.size_after(torch.bfloat16)
    assert after.bits_per_weight == 4.25
    assert after.transform_bytes == 32 * 2 * 32**2 * (3 * 4096 + 14336) // 32


def test_ignored_linears_are_counted_with_everything_else() -> None:
    config = tiny_config(architectures=["LlamaForCausalLM"])
    shape = run_of(config, recipe("rtn", ignore=["model.layers.0.*"]), 1, 2).shape
    assert [len(sites) for sites in shape.blocks] == [0, 4]
    assert shape.fullest == shape.blocks[1]


@pytest.mark.parametrize("kind", EXPERT_MODELS)
@pytest.mark.parametrize(
    "chosen",
    [
        recipe("rtn"),
        recipe("hadamard", ignore=["*.experts.1.*"]),
        recipe("duquant++"),
        recipe("duquant++", transform__sharing="block"),
    ],
    ids=lambda chosen: f"{chosen.name} {chosen.sharing}",
)
def test_experts_are_counted_as_they_are_written(tmp_path: Path, kind: str, chosen: Recipe) -> None:
    folder = write_tiny_mixture(tmp_path / "tiny", kind)
    size = write(folder, tmp_path / "out", chosen)["size"]
    shape = run_of(read_config(folder), chosen, 6, 24).shape
    after = shape.size_after(torch.float16)
    assert after.as_table() | {"bits_per_weight": after.bits_per_weight, "total_bytes": after.total_bytes} == size
    assert (after.bits_per_weight == 4.25) == (not chosen.ignore)
    experts = 3 if chosen.ignore else 4
    assert [(site.site.name, site.experts, site.transforms) for site in shape.fullest[2:]] == [
        ("gate_up", experts, 1),
        ("down", experts, experts),
    ]
    assert {site.share for site in shape.fullest[2:]} == {0.5}
    assert shape.active_parameters == shape.parameters - 2 * 3 * 64 * 96 * experts / 2
