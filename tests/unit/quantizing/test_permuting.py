"""Permutations of a recipe: found on the calibration text, in the source of all that follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_model import random_windows, tiny_config, write_tiny_mixture, write_tiny_model
from tests.unit.checkpoint.folders import digests, without_run, write

from mxrot.errors import ConfigError
from mxrot.layers import build_apart
from mxrot.models import FAMILIES, FolderSource
from mxrot.quantizing import quantize
from mxrot.quantizing import run as pipeline
from mxrot.quantizing.loading import load_original
from mxrot.quantizing.permuting import diagonal_blocks
from mxrot.quantizing.problems import find_problems
from mxrot.recipe import Recipe, load_recipe
from mxrot.suited import suited
from mxrot.surgery import PermutedFfn, PermutedHeads
from mxrot.transforms import channel_order

WINDOWS = random_windows(6, 40)


def permuting(name: str = "hadamard", block: int = 8, **keys: Any) -> Recipe:
    changes = {f"permutation.{key}": value for key, value in keys.items()}
    return load_recipe(name).changed({"transform.block": block, "calibration.seq_len": 40} | changes)


def test_the_order_is_that_of_the_original_moments(tmp_path: Path) -> None:
    """Taken by hand from the original model: both sites of the last block."""
    source = FolderSource(write_tiny_model(tmp_path / "tiny", torch.float32))
    found = quantize(source, permuting(ffn="correlated", value_heads="balanced"), windows=WINDOWS).source
    assert isinstance(found, PermutedHeads) and isinstance(found.inner, PermutedFfn)
    model = load_original(source, torch.float32, torch.device("cpu"))
    block = model.model.layers[1]
    seen = {}
    for linear in (block.mlp.down_proj, block.self_attn.o_proj):
        linear.register_forward_pre_hook(lambda module, x: seen.__setitem__(module, x[0].flatten(0, -2).double()))
    with torch.no_grad():
        model(WINDOWS)

    def moments(linear: torch.nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
        x, w = seen[linear], linear.weight.detach().double()
        return x.T @ x / len(x), w.T @ w / len(w)

    inner = channel_order(*(one[None] for one in moments(block.mlp.down_proj)), 8, "correlated")
    assert torch.equal(found.inner.orders["model.layers.1.mlp.down_proj"], inner)
    assert not torch.equal(inner, torch.arange(96))
    x, w = moments(block.self_attn.o_proj)
    for head in range(2):
        own = [torch.stack([one[i : i + 16, i : i + 16] for i in (32 * head, 32 * head + 16)]) for one in (x, w)]
        assert torch.equal(found.orders[1, head], channel_order(*own, 8, "balanced"))
        assert torch.equal(own[0], diagonal_blocks(x, 16)[2 * head : 2 * head + 2])


def test_each_expert_has_its_own(tmp_path: Path) -> None:
    source = FolderSource(write_tiny_mixture(tmp_path / "tiny", "qwen3_moe", fused=True))
    found = quantize(source, permuting(ffn="balanced"), windows=WINDOWS).source
    assert isinstance(found, PermutedFfn) and len(found.orders) == 8
    assert len({tuple(order.tolist()) for order in found.orders.values()}) > 4


def test_what_is_not_quantized_stays(tmp_path: Path) -> None:
    source = FolderSource(write_tiny_model(tmp_path / "tiny"))
    recipe = permuting(ffn="balanced", value_heads="balanced").changed({"ignore": ["model.layers.0.*"]})
    found = quantize(source, recipe, windows=WINDOWS).source
    assert isinstance(found, PermutedHeads) and isinstance(found.inner, PermutedFfn)
    assert list(found.inner.orders) == ["model.layers.1.mlp.down_proj"]
    assert torch.equal(found.orders[0], torch.arange(16).expand(2, 16))


def test_every_method_goes_on_from_it(tmp_path: Path) -> None:
    """GPTQ towards the original's residual stream, on the permuted model: no bit depends on which run it was."""
    source = FolderSource(write_tiny_model(tmp_path / "tiny"))
    recipe = permuting("mxrot", ffn="correlated", value_heads="correlated").changed({"calibration.generated": 0})
    plain = load_recipe("mxrot").changed({"calibration.generated": 0, "transform.block": 8, "permutation": "none"})
    runs = [quantize(source, one, windows=WINDOWS).model for one in (recipe, recipe, plain)]
    states = [run.state_dict() for run in runs if run is not None]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    down = [name for name in states[0] if "mlp.down_proj" in name]
    assert down and not any(torch.equal(states[0][name], states[2][name]) for name in down)


def test_heads_that_are_not_whole_blocks_stay_as_they_are() -> None:
    both = permuting(block=32, value_heads="balanced", ffn="balanced")
    assert not list(find_problems(build_apart(tiny_config()), FAMILIES["llama"], both, "here"))
    found, (said,) = suited(both, FAMILIES["llama"], tiny_config())
    assert found == permuting(block=32, ffn="balanced")
    assert "heads are 16 wide, which is not a multiple of the transform's block of 32" in said


def test_a_cache_that_mixes_heads_takes_their_order_away() -> None:
    both = permuting(ffn="balanced", value_heads="balanced").changed({"cache.transform": "hadamard"})
    found, (said,) = suited(both, FAMILIES["llama"], tiny_config())
    assert found == permuting(ffn="balanced").changed({"cache.transform": "hadamard"})
    assert said.startswith('permutation.value_heads: cache.transform = "hadamard" mixes the channels of a head')


def test_tables_that_say_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match='permutation: ffn and value_heads are both "none"; set one of them'):
        permuting(ffn="none")
    assert not permuting(ffn="balanced").is_data_free and load_recipe("hadamard").is_data_free


def test_a_run_that_goes_on_takes_the_orders_that_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_tiny_model(tmp_path / "tiny")
    chosen = permuting("mxrot", ffn="correlated").changed({"calibration.generated": 0})
    write(source, tmp_path / "whole", chosen, windows=WINDOWS)

    def stop(done: float, total: int, what: str) -> None:
        if done == 1 and total == 2 and "order" not in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(source, tmp_path / "out", chosen, windows=WINDOWS, progress=stop)
    assert (tmp_path / "out.partial" / "orders.safetensors").is_file()
    monkeypatch.setattr(pipeline, "find_orders", None)
    write(source, tmp_path / "out", chosen, windows=WINDOWS, resume=True)
    assert without_run(digests(tmp_path / "out")) == without_run(digests(tmp_path / "whole"))
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith("orders")]


def test_there_may_be_nothing_to_order(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "tiny")
    chosen = permuting("mxrot", ffn="correlated", value_heads="correlated")
    chosen = chosen.changed({"calibration.generated": 0, "ignore": ["*down_proj", "*o_proj"]})
    run = write(source, tmp_path / "out", chosen, windows=WINDOWS)
    assert not [said for said in run["changes"] if said.startswith("MLP permuted")]
