"""A cache that is asked for at run time: its names, who cannot have it, and that it comes and goes without a trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny_model import random_windows, tiny_config, write_tiny_model
from tests.unit.checkpoint.folders import recipe, write
from transformers import LlamaForCausalLM, PreTrainedModel

import mxrot
from mxrot.api import kept_answers
from mxrot.errors import ConfigError
from mxrot.evaluation import perplexity
from mxrot.formats import FORMATS
from mxrot.layers import cache_scheme_of
from mxrot.layers.cache_size import cache_of
from mxrot.opening import open_model
from mxrot.run_time_cache import NAMES, RunTimeCache, check_cache, open_with_cache, set_cache

WINDOWS = random_windows(4, 32)
FULL = {"mxfp4": "mxfp4", "mxfp8": "mxfp8_e4m3", "int4": "int4_row_asym", "int2": "int2_g32_asym"}


def attentions_of(model: PreTrainedModel) -> list[str]:
    """What every module of the model would compute attention with."""
    return [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]


def tiny(**changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    settings = {"head_dim": 32} | changes
    return LlamaForCausalLM(tiny_config(architectures=["LlamaForCausalLM"], **settings)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), head_dim=32)


@pytest.mark.parametrize(("short", "full"), FULL.items())
def test_short_names_stand_for_formats(short: str, full: str) -> None:
    assert RunTimeCache.of(short) == RunTimeCache.of(full) == RunTimeCache(full, full)
    assert RunTimeCache.of(full).label == f"{short} hadamard"
    assert set(NAMES) <= set(FULL) and set(FULL.values()) <= set(FORMATS)


def test_keys_and_values_may_have_formats_of_their_own() -> None:
    found = RunTimeCache.of("mxfp8/int4", "none")
    assert found == RunTimeCache("mxfp8_e4m3", "int4_row_asym", "none") and found.label == "mxfp8/int4"
    assert found.scheme is not None
    assert (found.scheme.keys.format.name, found.scheme.values.format.name) == ("mxfp8_e4m3", "int4_row_asym")


def test_both_transforms_are_those_of_run_time() -> None:
    for kind, installed in (("none", "none"), ("hadamard", "hadamard"), ("second-moment", "stored")):
        scheme = RunTimeCache.of("mxfp4", kind, 4, 8).scheme
        assert scheme is not None
        assert (scheme.key_transform, scheme.value_transform) == (installed, installed)
        assert (scheme.first, scheme.last) == (4, 8)
    assert RunTimeCache.of("mxfp4", "none", 4, 8).label == "mxfp4 first 4 last 8"
    assert (
        RunTimeCache.of("none", "second-moment", 4) == RunTimeCache.of("none")
        and RunTimeCache.of("none").scheme is None
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "mxpf4"}, "--kv: unknown format 'mxpf4'; did you mean 'mxfp4'"),
        ({"format": ""}, "--kv: unknown format ''"),
        ({"format": "mxfp8/"}, "--kv: unknown format ''"),
        ({"format": "mxfp8/mxpf4"}, "--kv: unknown format 'mxpf4'"),
        ({"format": "mxfp8/none"}, "--kv: unknown format 'none'"),
        ({"format": "MXFP4"}, "did you mean 'mxfp4'"),
        ({"format": "int4_row", "transform": ""}, "--kv-transform: unknown transform ''"),
        (
            {"format": "mxfp4", "transform": "hadamrad"},
            "--kv-transform: unknown transform 'hadamrad'; did you mean 'hadamard'",
        ),
        ({"format": "mxfp4", "first": -1}, "--kv mxfp4: cache: first: expected a number of tokens, 0 or more, got -1"),
        ({"format": "mxfp4", "last": -128}, "last: .* got -128"),
    ],
)
def test_names_and_numbers_that_are_none(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RunTimeCache.of(**options)  # type: ignore[arg-type]


def test_heads_that_are_not_whole_blocks_are_refused_by_the_config_alone(tmp_path: Path) -> None:
    narrow = write_tiny_model(tmp_path / "narrow")
    (narrow / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"narrow: --kv mxfp4: heads are 16 wide, which is not a multiple of 32"):
        check_cache(RunTimeCache.of("mxfp4"), str(narrow))
    check_cache(RunTimeCache.of("int4"), str(narrow))
    check_cache(RunTimeCache.of("none"), str(narrow))


def test_a_width_without_a_hadamard_matrix_takes_none() -> None:
    odd = tiny(hidden_size=92, head_dim=23 * 2, num_attention_heads=2, num_key_value_heads=2)
    with pytest.raises(ConfigError, match=r"--kv-transform hadamard: .*46.* take --kv-transform none"):
        set_cache(odd, RunTimeCache.of("int4"))
    assert cache_of(odd) is None
    set_cache(odd, RunTimeCache.of("int4", "none"))
    assert cache_of(odd) is not None


def test_without_a_cache_again_a_model_is_what_it_was() -> None:
    model = tiny()
    names, plain = set(model.state_dict()), perplexity(model, WINDOWS)
    kinds = attentions_of(model)
    assert set_cache(model, RunTimeCache.of("int2", "second-moment"), WINDOWS) is None
    assert perplexity(model, WINDOWS) != plain
    assert any(name.endswith("self_attn.key_transform") for name in model.state_dict())
    before = set_cache(model, RunTimeCache.of("none"))
    assert before is not None and before.key_transform == "stored"
    assert set(model.state_dict()) == names and perplexity(model, WINDOWS) == plain
    assert attentions_of(model) == kinds


def test_a_cache_takes_the_place_of_another_and_of_its_matrices() -> None:
    model, other = tiny(), tiny()
    set_cache(other, RunTimeCache.of("mxfp4"))
    set_cache(model, RunTimeCache.of("int2", "second-moment"), WINDOWS)
    before = set_cache(model, RunTimeCache.of("mxfp4"))
    assert before is not None and before.keys.format.name == "int2_g32_asym"
    assert cache_of(model) == RunTimeCache.of("mxfp4").scheme
    assert set(model.state_dict()) == set(other.state_dict())
    assert perplexity(model, WINDOWS) == perplexity(other, WINDOWS)


def test_a_fitted_transform_needs_a_text_and_weights_that_are_not_quantized(folder: Path, tmp_path: Path) -> None:
    fitted = RunTimeCache.of("mxfp4", "second-moment")
    with pytest.raises(ConfigError, match="fitted on a text, and none was given"):
        set_cache(tiny(), fitted)
    write(folder, tmp_path / "out", recipe("rtn"))
    with pytest.raises(ConfigError, match=r"second-moment: is fitted to the weights that read values"):
        check_cache(fitted, str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="second-moment"):
        set_cache(open_model(tmp_path / "out", "cpu")[0], fitted, WINDOWS)


def test_operands_of_attention_that_are_quantized_stand_against_it(folder: Path, tmp_path: Path) -> None:
    quantized = mxrot.quantize(folder, recipe("rtn").changed({"attention.queries_keys": "mxfp4"}))
    with pytest.raises(ConfigError, match="operands of its attention's products are quantized"):
        set_cache(quantized, RunTimeCache.of("mxfp4"))
    write(folder, tmp_path / "out", recipe("rtn").changed({"attention.queries_keys": "mxfp4"}))
    with pytest.raises(ConfigError, match="operands of its attention's products are quantized"):
        check_cache(RunTimeCache.of("mxfp4"), str(tmp_path / "out"))


def test_answers_that_were_read_through_another_cache_are_not_taken(folder: Path, tmp_path: Path) -> None:
    model, path = open_model(folder, "cpu")[0], tmp_path / "answers"
    set_cache(model, RunTimeCache.of("mxfp4"))
    with kept_answers(path, model, folder):
        pass
    kept_answers(path, model, folder, resume=True)
    for other in (RunTimeCache.of("mxfp4", "none"), RunTimeCache.of("none")):
        set_cache(model, other)
        with pytest.raises(ConfigError, match="answers of a run with another cache"):
            kept_answers(path, model, folder, resume=True)


def test_a_checkpoint_opens_with_it(folder: Path, tmp_path: Path) -> None:
    write(folder, tmp_path / "out", recipe("rtn"))
    plain, _, _ = open_with_cache(str(tmp_path / "out"), None, "cpu")
    model, found, before = open_with_cache(str(tmp_path / "out"), RunTimeCache.of("int2"), "cpu")
    assert found == tmp_path / "out" and before is None
    assert perplexity(plain, WINDOWS) != perplexity(model, WINDOWS)
    blocks = model.get_submodule("model.layers").children()
    assert all(cache_scheme_of(block.get_submodule("self_attn")) is not None for block in blocks)
