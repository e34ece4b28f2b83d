"""Models that are spread over CPU and disk, or held back by accelerate's hooks between calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from tests.cases.commands import IDS
from tests.cases.transformers_models import from_pretrained, loaded, outputs, write_checkpoint
from tests.tiny_model import write_tiny_mixture
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import mxrot
from mxrot.errors import ConfigError, FamilyError

CPU = torch.device("cpu")
OUTSIDE = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
MAPS: dict[str, Any] = {
    "a block on disk": OUTSIDE | {"model.layers.0": "cpu", "model.layers.1": "disk"},
    "all on disk": {"": "disk"},
    "the linears of a site apart": OUTSIDE
    | {f"model.layers.0.self_attn.{name}_proj": place for name, place in zip("qkvo", ("cpu", "disk") * 2, strict=True)}
    | {f"model.layers.0.{norm}_layernorm": "cpu" for norm in ("input", "post_attention")}
    | {"model.layers.0.mlp": "disk", "model.layers.1": "cpu"},
    "cpu": "cpu",
}
if not torch.cuda.is_available():  # else it takes the GPU, which is another sum
    MAPS["auto"] = "auto"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("offload") / "out")


@pytest.fixture(scope="module")
def expected(folder: Path) -> Tensor:
    return outputs(loaded(folder))


def assert_same(model: nn.Module, expected: Tensor) -> None:
    """Twice, because hooks take values away again after the first call; with gradients recorded, too."""
    for _ in range(2):
        assert torch.equal(outputs(model), expected)  # type: ignore[arg-type]
    assert torch.equal(model(IDS).logits, expected)


@pytest.mark.case("C2")
@pytest.mark.parametrize("places", MAPS.values(), ids=MAPS)
def test_a_device_map_gives_the_same_logits(folder: Path, expected: Tensor, tmp_path: Path, places: Any) -> None:
    assert_same(from_pretrained(folder, device_map=places, offload_folder=tmp_path), expected)


@pytest.mark.case("C2")
def test_a_device_map_within_a_limit_of_memory(folder: Path, expected: Tensor, tmp_path: Path) -> None:
    model = from_pretrained(folder, device_map="auto", max_memory={"cpu": 120_000}, offload_folder=tmp_path)
    assert "disk" in model.hf_device_map.values()
    assert_same(model, expected)


@pytest.mark.case("C2")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_codes_and_scales_on_disk_keep_their_types(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    expected = outputs(from_pretrained(folder, dtype=dtype))
    assert_same(from_pretrained(folder, dtype=dtype, device_map={"": "disk"}, offload_folder=tmp_path), expected)


HOOKS: dict[str, Callable[[nn.Module, Path], object]] = {
    "cpu": lambda model, _: accelerate.cpu_offload(model, CPU),
    "cpu with buffers": lambda model, _: accelerate.cpu_offload(model, CPU, offload_buffers=True),
    "cpu, attention as a whole": lambda model, _: accelerate.cpu_offload(
        model, CPU, preload_module_classes=["LlamaAttention"]
    ),
    "disk": lambda model, folder: accelerate.disk_offload(model, str(folder), CPU),
    "dispatched": lambda model, folder: accelerate.dispatch_model(
        model, MAPS["a block on disk"], main_device="cpu", offload_dir=str(folder)
    ),
}


@pytest.mark.case("C2")
@pytest.mark.parametrize("is_prepared", [False, True])
@pytest.mark.parametrize("offload", HOOKS.values(), ids=HOOKS)
def test_hooks_give_the_same_logits(
    folder: Path, tmp_path: Path, offload: Callable[[nn.Module, Path], object], is_prepared: bool
) -> None:
    """Also where the whole weight of a site was prepared before, with biases that are held back one by one."""
    model = loaded(folder, is_prepared)
    expected = outputs(model)
    offload(model, tmp_path)
    assert_same(model, expected)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)


@pytest.mark.case("C2")
def test_gradients_through_an_offloaded_model(folder: Path) -> None:
    gradients = []
    for is_offloaded in (False, True):
        model = loaded(folder)
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_(True)
        if is_offloaded:
            accelerate.cpu_offload(model, CPU)
        model(inputs_embeds=embedded).logits.sum().backward()
        gradients.append(embedded.grad)
    assert torch.equal(*gradients)


@pytest.mark.case("C2")
def test_experts_share_a_transform_that_is_offloaded(tmp_path: Path) -> None:
    source = write_tiny_mixture(tmp_path / "source", "mixtral")
    mxrot.quantize(source, "hadamard", tmp_path / "out")
    expected = outputs(from_pretrained(tmp_path / "out"))
    model = from_pretrained(tmp_path / "out", device_map={"": "disk"}, offload_folder=tmp_path / "offloaded")
    assert_same(model, expected)


@pytest.mark.case("C2")
def test_a_module_around_a_linear_may_be_offloaded(folder: Path, expected: Tensor) -> None:
    class Around(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, *arguments: Any, **keywords: Any) -> Any:
            return self.base(*arguments, **keywords)

    model = loaded(folder, is_prepared=True)
    for block in model.model.layers:
        block.self_attn.q_proj = Around(block.self_attn.q_proj)
        block.mlp = Around(block.mlp)
    accelerate.cpu_offload(model, CPU)
    assert_same(Around(model), expected)


@pytest.mark.case("C2")
def test_an_offloaded_model_generates_and_is_saved(folder: Path, tmp_path: Path, expected: Tensor) -> None:
    model = from_pretrained(folder, device_map=MAPS["a block on disk"], offload_folder=tmp_path / "offloaded")
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    seen = torch.ones_like(IDS)
    written = model.generate(IDS, attention_mask=seen, **options)
    assert torch.equal(written, loaded(folder).generate(IDS, attention_mask=seen, **options))
    with pytest.warns(UserWarning, match="offloaded"):
        model.save_pretrained(tmp_path / "saved")
    assert torch.equal(outputs(loaded(tmp_path / "saved")), expected)


SPREAD: dict[str, Any] = {
    "a block on disk": MAPS["a block on disk"],
    "all on disk": {"": "disk"},
    "all on meta": {"": "meta"},
    "two devices": {"model": 0, "lm_head": "cpu"},
}


@pytest.mark.case("C8")
@pytest.mark.parametrize("places", SPREAD.values(), ids=SPREAD)
def test_quantizing_on_load_wants_one_device(folder: Path, tmp_path: Path, places: Any) -> None:
    source = folder.with_name("out-source")
    with pytest.raises(ConfigError, match="must be on one device") as raised:
        AutoModelForCausalLM.from_pretrained(
            source, quantization_config=mxrot.MxrotConfig("hadamard"), device_map=places, offload_folder=tmp_path
        )
    assert "\n" not in str(raised.value)


@pytest.mark.case("C8")
def test_a_model_of_no_known_family_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=1, vocab_size=40)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(FamilyError, match="GPT2LMHeadModel is of no known family"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=mxrot.MxrotConfig("hadamard"))


@pytest.mark.case("C8")
def test_what_auto_stands_for_is_looked_at(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"device_map": "auto", "max_memory": {"cpu": 60_000}, "offload_folder": tmp_path}
    with pytest.raises(ConfigError, match=r"must be on one device, got .*disk"):
        AutoModelForCausalLM.from_pretrained(
            folder.with_name("out-source"), quantization_config=mxrot.MxrotConfig("hadamard"), **options
        )


@pytest.mark.case("C8")
@pytest.mark.parametrize("places", [None, "cpu", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantizing_on_load_on_one_device(folder: Path, places: Any, dtype: torch.dtype) -> None:
    source = folder.with_name("out-source")
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    expected = mxrot.quantize(copy.deepcopy(plain), "hadamard")
    model = AutoModelForCausalLM.from_pretrained(
        source,
        quantization_config=mxrot.MxrotConfig("hadamard"),
        device_map=copy.copy(places),
        dtype=dtype,
        low_cpu_mem_usage=True,
    )
    assert model.dtype == dtype
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name].to(value.dtype)) for name, value in found.items())
