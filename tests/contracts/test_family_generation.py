"""Every family token by token with a cache, and what is planned of it beside what folders hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.contracts.test_families import TINY_FAMILIES, each, numbers_of, spread_gains
from tests.contracts.tiny_configs import auto_class, config_of
from tests.float64 import InFloat64
from tests.tiny_model import write_tokenizer
from tests.unit.checkpoint.folders import recipe, write
from torch import Tensor
from transformers import PreTrainedModel

import mxrot
from mxrot.calibration.generation import cache_bytes
from mxrot.layers import PackedCache, PackedCacheLayer, separate_experts
from mxrot.layers.cache_size import CacheSize
from mxrot.layers.kv_cache import states_in
from mxrot.models import Family
from mxrot.planning import Machine, OtherRates, make_plan
from mxrot.planning.rates import Rates
from mxrot.recipe import load_recipe
from mxrot.run_time_cache import RunTimeCache, set_cache

IDS = torch.randint(3, 50, (2, 40), generator=torch.Generator().manual_seed(1))
"""So long that windows of four tokens, and positions beyond the first 16, count."""
NO_TIME = Machine(torch.device("cpu"), other=OtherRates("none", "cpu", Rates(*[1.0] * len(Rates.__dataclass_fields__))))


def model_of(family: Family) -> PreTrainedModel:
    """Random weights that are large enough for attention to have a say, and gains and biases that count."""
    torch.manual_seed(0)
    model = auto_class(family).from_config(config_of(family)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data *= 5
    spread_gains(model, family)
    return model


def by_pieces(model: PreTrainedModel, sizes: list[int]) -> Tensor:
    """Logits of all tokens, with keys and values kept from piece to piece. Positions are given, because Bamba counts
    them from 0 otherwise."""
    cache, logits = None, []
    positions = torch.arange(IDS.shape[1])[None].split(sizes, dim=1)
    for piece, places in zip(IDS.split(sizes, dim=1), positions, strict=True):
        out = model(piece, position_ids=places, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


@each
def test_a_cache_changes_no_logits(family: Family) -> None:
    """A prompt, and then single tokens; in float64, up to the order of sums."""
    model = model_of(family).double()
    if family.experts is not None:
        model.set_experts_implementation("eager")  # the one that takes float64
    with InFloat64():
        whole = model(IDS, use_cache=False).logits
        found = by_pieces(model, [30] + [1] * 10)
        last = model(IDS[:, -1:]).logits
    assert float((found - whole).abs().max() / whole.abs().max()) < 1e-10
    assert not torch.allclose(whole[:, -1], last[:, 0], rtol=1e-3)


MIXED = [family for family in TINY_FAMILIES.values() if family.attention_in and family.heads_obstacle is None]


@pytest.mark.parametrize("family", MIXED, ids=[family.name for family in MIXED])
@pytest.mark.parametrize("kept", [("int4", "hadamard"), ("int4", "none", 2, 4)], ids=str)
def test_a_quantized_cache_beside_states_changes_no_logits(family: Family, kept: tuple[Any, ...]) -> None:
    """A prompt, and then single tokens; keys and values are quantized where there are any, and it shows."""
    model = model_of(family).double()
    separate_experts(model)
    with InFloat64():
        plain = model(IDS, use_cache=False).logits
        set_cache(model, RunTimeCache.of(*kept))
        whole = model(IDS, use_cache=False).logits
        found = by_pieces(model, [30] + [1] * 10)
        cache = model(IDS[:, :9], use_cache=True).past_key_values
    assert float((found - whole).abs().max() / whole.abs().max()) < 1e-10
    assert float((whole - plain).abs().max() / plain.abs().max()) > 1e-3
    attends = [family.attends(index) for index in numbers_of(family)]
    assert [isinstance(layer, PackedCacheLayer) for layer in cache.layers] == attends
    assert isinstance(cache, PackedCache) and cache.nbytes > sum(x.nbytes for x in states_in(cache.layers)) > 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, family in TINY_FAMILIES.items():
        found[name] = tmp_path_factory.mktemp(name)
        model_of(family).bfloat16().save_pretrained(found[name])
        write_tokenizer(found[name])
    return found


@each
def test_a_checkpoint_writes_the_same_with_a_cache(folders: dict[str, Path], family: Family, tmp_path: Path) -> None:
    write(folders[family.name], tmp_path / "out", recipe("rtn"), windows=None)
    loaded = mxrot.load(tmp_path / "out", device="cpu")
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with_cache, without = (loaded.generate(IDS, use_cache=uses, **options) for uses in (True, False))
    assert with_cache.shape == (2, 52) and torch.equal(with_cache, without)


@each
@pytest.mark.parametrize("name", ["rtn", "mxrot"])
def test_a_plan_counts_what_is_there(folders: dict[str, Path], family: Family, tmp_path: Path, name: str) -> None:
    """Parameters as transformers counts them, and the bytes of the checkpoint."""
    folder = folders[family.name]
    config = tmp_path / "config.json"
    config.write_bytes((folder / "config.json").read_bytes())
    assert json.loads(config.read_text())["architectures"] == [family.architectures[0]]
    plan = make_plan(family.name, config, load_recipe(name), NO_TIME)
    assert plan.problems == [] and plan.sizes is not None
    model = auto_class(family).from_pretrained(folder)
    assert plan.sizes.shape.parameters == model.num_parameters()
    assert plan.sizes.before == bytes_in(folder)
    windows = None if name == "rtn" else IDS
    write(folder, tmp_path / "out", recipe(name), windows=windows)
    assert bytes_in(tmp_path / "out") == plan.sizes.after.total_bytes


@each
def test_a_cache_takes_what_is_counted(family: Family) -> None:
    """Of a sequence that no window has left yet, in bfloat16, and in float32 where that is computed with."""
    for dtype in (torch.bfloat16, torch.float32):
        model = model_of(family).to(dtype)
        cache = model(IDS[:1, :3], use_cache=True).past_key_values
        held = sum(x.nbytes for layer in cache.layers for x in _kept(layer))
        assert held == cache_bytes(model.config, 3, dtype.itemsize)
        assert dtype != torch.bfloat16 or held == CacheSize.of(model.config, family, None).bytes_at(3)


def _kept(layer: Any) -> list[Tensor]:
    """What a layer of transformers' cache holds."""
    if hasattr(layer, "recurrent_states"):
        states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
        return [state for state in states if state is not None]
    kinds = (layer.keys, layer.values, getattr(layer, "indexer_keys", None))
    return [one for one in kinds if one is not None]  # MLPs that are blocks keep nothing


def bytes_in(folder: Path) -> int:
    """Of all tensors in the files of a folder."""
    found = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    return found
