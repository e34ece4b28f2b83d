import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.contracts.tiny_configs import config_of
from tests.tiny_model import tiny_config, write_tiny_model
from transformers import BertConfig, Gemma3TextConfig, GPT2Config, LlamaForCausalLM

from mxrot.errors import FamilyError
from mxrot.models import (
    FAMILIES,
    build_skeleton,
    fill,
    find_family,
    read_config,
    read_generation_config,
    rebuild_buffers,
    start_token,
)
from mxrot.models.families.gemma3 import FAMILY as GEMMA3
from mxrot.models.families.llama import FAMILY as LLAMA
from mxrot.nearest import MOST_LISTED


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def changed_config(folder: Path, target: Path, **changes: Any) -> Path:
    """A folder with the config of another and some of its values changed."""
    target.mkdir(exist_ok=True)
    config = json.loads((folder / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_read_config(folder: Path) -> None:
    config = read_config(folder)
    assert config.num_hidden_layers == 2 and find_family(config, "x") is LLAMA
    assert read_config(folder / "config.json").to_dict() == config.to_dict()


def test_what_texts_start_with(folder: Path) -> None:
    config = Gemma3TextConfig(architectures=["Gemma3ForCausalLM"], bos_token_id=2)
    assert start_token(config) == 2
    assert start_token(read_config(folder)) is None and start_token(GPT2Config()) is None
    config.bos_token_id = None
    with pytest.raises(FamilyError, match=r"bos_token_id is missing"):
        start_token(config)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(FamilyError, match=r"no config\.json; expected a model folder in the Hugging Face layout"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b'{"model_type": "nope"}', b"\xff\xfe\x00"])
def test_a_broken_config(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(FamilyError, match=r"config\.json: (not|expected|model type) ") as raised:
        read_config(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": "two"},
        {"hidden_size": [64]},
        {"num_attention_heads": 0},
        {"hidden_act": "no such thing"},
        {"vocab_size": -1},
        {"rope_parameters": {"rope_type": "no such thing", "rope_theta": 1.0}},
    ],
    ids=str,
)
def test_a_config_with_a_bad_value(folder: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    """Wherever transformers trips over it."""
    with pytest.raises(FamilyError, match=r"config\.json: ") as raised:
        build_skeleton(read_config(changed_config(folder, tmp_path, **change)))
    assert "\n" not in str(raised.value)


def test_what_is_no_causal_language_model(folder: Path, tmp_path: Path) -> None:
    for config, named in (
        (BertConfig(architectures=["BertModel"]), "BertModel"),
        (tiny_config(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
        (tiny_config(), "none"),
    ):
        with pytest.raises(FamilyError, match=f"^some/model: architectures {named}: not a causal language model$"):
            find_family(config, "some/model")


def test_an_unknown_family_is_told_what_is_known() -> None:
    with pytest.raises(FamilyError) as raised:
        find_family(GPT2Config(architectures=["GPT2LMHeadModel"]), "gpt2")
    assert str(raised.value).startswith(
        "gpt2: architecture GPT2LMHeadModel is of no known family; known architectures: "
    )
    every = [architecture for family in FAMILIES.values() for architecture in family.architectures]
    assert "GlmForCausalLM" in str(raised.value)
    assert str(raised.value).endswith(f" and {len(every) - MOST_LISTED} more")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "stablelm",
            {"use_parallel_residual": True},
            "use_parallel_residual is True, and family stablelm ",
        ),
        (
            "nemotron_h",
            {"tie_word_embeddings": True},
            "tie_word_embeddings is True, and family nemotron_h is known with False only",
        ),
        (
            "granitemoehybrid",
            {"layer_types": ["linear_attention", "chunked_attention"]},
            "1 is of type 'chunked_attention', which family granitemoehybrid does not know",
        ),
        ("gemma4", {"hidden_size_per_layer_input": 32}, "hidden_size_per_layer_input is 32, and family gemma4 "),
        ("gemma4", {"num_kv_shared_layers": 1}, "num_kv_shared_layers is 1, and family gemma4 "),
    ],
)
def test_values_of_a_config_that_make_another_model(name: str, changes: dict[str, Any], message: str) -> None:
    find_family(config_of(FAMILIES[name]), "here")
    with pytest.raises(FamilyError, match=rf"^here: config\.json: .*{message}"):
        find_family(config_of(FAMILIES[name], **changes), "here")


@pytest.mark.parametrize("of_text", [False, True], ids=["whole", "of text"])
@pytest.mark.parametrize("method", ["compressed-tensors", "modelopt"])
def test_a_quantized_model_of_no_known_family_is_quantized_first(method: str, of_text: bool) -> None:
    """Whether its config says so, or that of its text model."""
    config = transformers.LlavaConfig(architectures=["LlavaForConditionalGeneration"])
    (config.get_text_config() if of_text else config).quantization_config = {"quant_method": method}
    with pytest.raises(FamilyError) as raised:
        find_family(config, "here")
    assert str(raised.value).startswith(
        "here: is quantized already (quantization_config in config.json); and its architecture "
        "LlavaForConditionalGeneration: a model of more than text of no known family; "
    )
    config = transformers.BloomConfig(architectures=["BloomForCausalLM"])
    config.quantization_config = {"quant_method": method}
    with pytest.raises(FamilyError, match=r"^here: is quantized already .* its architecture BloomForCausalLM is of no"):
        find_family(config, "here")


def test_a_model_that_hears_is_refused() -> None:
    config = config_of(FAMILIES["gemma4_with_images"])
    find_family(config, "here")
    config.audio_config = transformers.Gemma4AudioConfig()
    with pytest.raises(FamilyError, match=r"^here: .* family gemma4_with_images is known without audio_config"):
        find_family(config, "here")


def test_one_family_has_models_with_and_without_experts() -> None:
    with_experts = find_family(config_of(FAMILIES["gemma4"]), "here")
    changes = {"num_experts": None, "top_k_experts": None, "enable_moe_block": False}
    without = find_family(config_of(FAMILIES["gemma4"], **changes), "here")
    kinds = [[site.group for site in one.sites_of(1)] for one in (with_experts, without)]
    assert kinds[1] == ["qkv", "o", "gate_up", "down"]
    assert kinds[0] == [*kinds[1], "expert_gate_up", *["expert_down"] * 4]
    assert [site.linears[-1] for one in (0, 1) for site in without.sites_of(one)[:1]] == [
        "self_attn.v_proj",
        "self_attn.k_proj",
    ]


@pytest.mark.parametrize(("said", "is_refused"), [("vision", False), ("all", True), (True, True), (None, False)])
def test_attention_to_what_follows_is_for_images_alone(said: object, is_refused: bool) -> None:
    config = config_of(FAMILIES["gemma4"])
    vars(config)["use_bidirectional_attention"] = said
    if is_refused:
        with pytest.raises(FamilyError, match="use_bidirectional_attention: not a causal language model"):
            find_family(config, "here")
    else:
        assert find_family(config, "here").name == "gemma4"


def test_the_skeleton_holds_no_weights(folder: Path) -> None:
    model = build_skeleton(read_config(folder))
    assert isinstance(model, LlamaForCausalLM) and not model.training
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in model.parameters())


def test_a_model_without_rotary_embedding_gets_none() -> None:
    model = build_skeleton(config_of(FAMILIES["granitemoehybrid"], position_embedding_type=None))
    rebuild_buffers(model, FAMILIES["granitemoehybrid"], torch.device("cpu"))
    assert model.model.rotary_emb is None


@pytest.mark.parametrize("cap", [None, 20.0])
def test_soft_caps_are_never_left_to_an_attention_without_them(cap: float | None) -> None:
    """The rest of this config runs by PyTorch's own attention."""
    config = Gemma3TextConfig(attn_logit_softcapping=cap, num_hidden_layers=1, vocab_size=8, hidden_size=64)
    assert build_skeleton(config).config._attn_implementation == ("sdpa" if cap is None else "eager")


def test_a_factor_of_the_embedding_is_rebuilt_in_the_type_of_its_weights() -> None:
    """sqrt(3072) is 55.4 in float32 and 55.5 in bfloat16."""
    config = Gemma3TextConfig(hidden_size=3072, num_hidden_layers=1, vocab_size=8, architectures=["Gemma3ForCausalLM"])
    for dtype, factor in ((torch.float32, 3072**0.5), (torch.bfloat16, 55.5)):
        model = build_skeleton(config)
        embedding = model.get_submodule("model.embed_tokens")
        fill(embedding, {"weight": torch.ones(8, 3072, dtype=dtype)}, "embedding")
        rebuild_buffers(model, GEMMA3, torch.device("cpu"))
        found = embedding(torch.tensor([1]))
        assert found.dtype == dtype and torch.equal(found, torch.full_like(found, factor))
        assert "embed_scale" not in model.state_dict()


def test_rebuilt_rotary_is_that_of_an_ordinary_model(folder: Path) -> None:
    model = build_skeleton(read_config(folder))
    rebuild_buffers(model, LLAMA, torch.device("cpu"))
    ordinary = LlamaForCausalLM(tiny_config())
    assert torch.equal(model.model.rotary_emb.inv_freq, ordinary.model.rotary_emb.inv_freq)


def test_fill_takes_tensors_as_they_are(folder: Path) -> None:
    norm = build_skeleton(read_config(folder)).model.norm
    value = torch.arange(64, dtype=torch.float64)
    fill(norm, {"weight": value}, "model.norm")
    assert norm.weight.data_ptr() == value.data_ptr() and not norm.weight.requires_grad


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, r"expected weight \[64\], got no weight"),
        ({"weight": torch.ones(32)}, r"expected weight \[64\], got weight \[32\]"),
        ({"weight": torch.ones(64), "bias": torch.ones(64)}, r"expected no bias, got bias \[64\]"),
    ],
)
def test_fill_names_what_does_not_fit(folder: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    norm = build_skeleton(read_config(folder)).model.norm
    with pytest.raises(FamilyError, match=f"^model.norm: tensors do not fit the config: {message}$"):
        fill(norm, tensors, "model.norm")


def test_generation_config(folder: Path, tmp_path: Path) -> None:
    model = build_skeleton(read_config(folder))
    before = model.generation_config
    read_generation_config(model, tmp_path)
    assert model.generation_config is before
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens": 3}')
    read_generation_config(model, tmp_path)
    assert model.generation_config.max_new_tokens == 3
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(FamilyError, match=r"generation_config\.json: not a generation config that transformers reads"):
        read_generation_config(model, tmp_path)


def test_recurrent_blocks_of_a_config_that_does_not_say_which_are_refused() -> None:
    with pytest.raises(FamilyError, match=r"^x: config\.json has no layer_types, which a model of family qwen3_5 has$"):
        find_family(tiny_config(architectures=["Qwen3_5ForCausalLM"]), "x")
    config = config_of(FAMILIES["qwen3_5"])
    config.layer_types = ["linear_attention", "conv"]
    with pytest.raises(FamilyError, match=r"block 1 is of type 'conv', which family qwen3_5 does not know; it knows"):
        find_family(config, "x")
