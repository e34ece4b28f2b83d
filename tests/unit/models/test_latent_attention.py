"""DeepSeek's attention, with and without a narrow vector of queries."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.contracts.test_families import spread_gains
from tests.contracts.tiny_configs import config_of
from tests.tiny_model import write_tokenizer
from tests.unit.checkpoint.folders import recipe, write
from tests.unit.surgery.changed_sources import logits, off_by, rotation
from transformers import AutoModelForCausalLM

import mxrot
from mxrot.errors import ConfigError
from mxrot.models import FAMILIES, FolderSource, cached_numbers, find_family, query_width, value_heads, value_rows
from mxrot.run_time_cache import RunTimeCache, check_cache
from mxrot.surgery import FoldedNorms, Rotated, Untied

IDS = torch.arange(40)[None]


def lite_folder(folder: Path) -> Path:
    """A tiny V2-Lite in float16: queries are made at once."""
    torch.manual_seed(0)
    config = config_of(FAMILIES["deepseek_v2"], q_lora_rank=None)
    model = AutoModelForCausalLM.from_config(config)
    spread_gains(model, find_family(config, "here"))
    model.half().save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize(("rank", "names"), [(64, ["qkv_a", "q_b", "kv_b", "o"]), (None, ["q_kv_a", "kv_b", "o"])])
def test_sites_follow_from_the_config(rank: int | None, names: list[str]) -> None:
    family = find_family(config_of(FAMILIES["deepseek_v3"], q_lora_rank=rank), "here")
    assert [site.name for site in family.sites_of(0)] == [*names, "gate_up", "down"]
    assert [site.name for site in family.sites_of(1)][: len(names) + 1] == [*names, "gate_up"]


def test_values_lie_behind_their_keys() -> None:
    """12 rows of a key, 16 of a value, for each of 4 heads."""
    config = config_of(FAMILIES["deepseek_v3"])
    family = find_family(config, "here")
    assert value_heads(config) == (4, 16) and query_width(config) == 20 and cached_numbers(config, family) == (40, 40)
    rows = value_rows(family, 4 * 28, 4, 16)
    assert rows.tolist() == [list(range(28 * head + 12, 28 * head + 28)) for head in range(4)]


@pytest.mark.parametrize("rank", [64, None])
def test_gains_fold_away_and_inner_norms_keep_their_place(rank: int | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = config_of(FAMILIES["deepseek_v2"], q_lora_rank=rank, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config).double()
    spread_gains(model, find_family(config, "here"))
    model.save_pretrained(tmp_path)
    source = FolderSource(tmp_path)
    before = source.block(0)["self_attn.kv_b_proj.weight"]
    gain = source.block(0)["self_attn.kv_a_layernorm.weight"]
    for changed in (FoldedNorms(Untied(source)), Rotated(Untied(source), rotation())):
        assert off_by(logits(changed, IDS), logits(source, IDS)) < 1e-12
        norms = {name: x for name, x in changed.block(0).items() if x.dim() == 1 and "norm" in name}
        assert len(norms) == (4 if rank else 3) and all(bool((x == 1).all()) for x in norms.values())
        assert torch.equal(changed.block(0)["self_attn.kv_b_proj.weight"], before * gain)


@pytest.mark.parametrize("name", ["rtn", "duquant++", "mxrot", "quarot"])
def test_a_model_without_a_narrow_vector_of_queries(tmp_path: Path, name: str) -> None:
    """To a checkpoint and back, and with a cache as without."""
    chosen = recipe(name)
    windows = torch.randint(0, 50, (6, 24), generator=torch.Generator().manual_seed(0))
    write(lite_folder(tmp_path / "in"), tmp_path / "out", chosen, windows=None if chosen.is_data_free else windows)
    loaded = mxrot.load(tmp_path / "out", device="cpu")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(loaded(IDS).logits, other(IDS).logits)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with_cache, without = (loaded.generate(IDS[:, :8], use_cache=uses, **options) for uses in (True, False))
    assert torch.equal(with_cache, without)


def test_a_cache_in_codes_is_refused(tmp_path: Path) -> None:
    folder = lite_folder(tmp_path / "in")
    with pytest.raises(ConfigError, match=r"--kv int4: in family deepseek_v2 keys and .*; take --kv none$"):
        check_cache(RunTimeCache.of("int4"), str(folder))
    check_cache(RunTimeCache.of("none"), str(folder))
