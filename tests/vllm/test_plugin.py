"""mxrot's own quantization method in vLLM: the same logits as `mxrot.load`."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.checkpoint.folders import TOKENS, all_tensors
from tests.unit.checkpoint.folders import logits as own_logits
from tests.vllm.plain_vllm import configure, load, logits
from tests.vllm.test_stock import parts_of, relative_error
from torch import Tensor
from transformers import AutoConfig
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import _CUSTOMIZED_METHOD_TO_QUANT_CONFIG as CUSTOM
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

import mxrot
from mxrot.errors import ConfigError
from mxrot.kernels import warm_up
from mxrot.kernels.fixed_rows import has_invariant_rows, set_invariant_rows
from mxrot.layers import QuantLinear
from mxrot.marker import IN_VLLM
from mxrot.vllm.linear import MxrotLinearMethod, MxrotQuantization
from mxrot.vllm.plugin import register
from mxrot.vllm.verdict import check_for_vllm

Checkpoints = Callable[[str], Path]
KINDS = [
    "plain",
    "site",
    "block",
    "one-for-all-blocks",
    "blocks-of-16",
    "bias",
    "ignores-down",
    "weights-only",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "mixture",
    "other-formats",
    "whole-rows",
]


@pytest.fixture(autouse=True, scope="module")
def plugin() -> Any:
    """Registered, twice as in vLLM's processes, for this module only."""
    register()
    register()
    yield
    del CUSTOM[IN_VLLM]
    QUANTIZATION_METHODS.remove(IN_VLLM)


def test_vllm_finds_the_plugin_by_itself() -> None:
    (found,) = entry_points(group="vllm.general_plugins", name=IN_VLLM)
    assert found.load() is register


def test_the_marker_decides_and_the_user_decides_before_it(checkpoint: Checkpoints, exported: Checkpoints) -> None:
    for folder in (checkpoint("site"), exported("site")):
        assert configure(folder, "bfloat16").model_config.quantization == IN_VLLM
    assert configure(folder, "bfloat16", "compressed-tensors").model_config.quantization == "compressed-tensors"
    foreign = json.loads((exported("site") / "config.json").read_text())["quantization_config"]
    del foreign["mxrot"]
    # Transforms by mxrot's names and no marker: damaged, and to be refused by mxrot instead of run without them.
    assert CUSTOM[IN_VLLM].override_quantization_method(foreign, None) == IN_VLLM
    del foreign["transform_config"]
    assert CUSTOM[IN_VLLM].override_quantization_method(foreign, None) == IN_VLLM  # its groups are
    foreign["config_groups"]["group_0"]["format"] = foreign["format"]
    assert CUSTOM[IN_VLLM].override_quantization_method(foreign, None) is None


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_ours_bit_for_bit_in_float32(kind: str, checkpoint: Checkpoints) -> None:
    folder = checkpoint(kind)
    assert check_for_vllm(folder).plugin.stops == ()
    config = configure(folder, "float32")
    model = load(config)
    qkv = model.model.layers[1].self_attn.qkv_proj
    assert isinstance(qkv.quant_method, MxrotLinearMethod)
    assert sorted(name for name, _ in qkv.named_parameters(recurse=False)) == (["bias"] if qkv.has_bias else [])
    assert torch.equal(logits(model, config, TOKENS), own_logits(mxrot.load(folder)))


@pytest.mark.parametrize("kind", ["site", "block", "bias"])
def test_linears_are_ours_bit_for_bit_in_bfloat16(kind: str, checkpoint: Checkpoints) -> None:
    """On the inputs that they see in vLLM. Logits cannot be: vLLM's norms round in other places, and a value that falls
    on the other side of a rounding boundary of MXFP4 makes a step."""
    folder = checkpoint(kind)
    config = configure(folder, "bfloat16")
    model = load(config)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "quant_method", None), MxrotLinearMethod):
            module.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0], y[0])}))
    found = logits(model, config, TOKENS)
    assert len(seen) == 2 * 4
    own = mxrot.load(folder, dtype=torch.bfloat16)
    for name, (x, y) in seen.items():
        expected = torch.cat([own.get_submodule(part)(x) for part in parts_of(name)], dim=-1)
        assert torch.equal(y, expected)
    exact = own_logits(mxrot.load(folder))
    inherent = relative_error(own_logits(own), exact)
    assert relative_error(found, exact) < 2 * inherent


def test_kernels_are_compiled_when_weights_are_loaded(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, once for each shape, in the model's type and up to the tokens of a step."""
    monkeypatch.setattr(warm_up, "compiles", lambda device: True)
    monkeypatch.setattr(warm_up, "_warm", set())
    called: list[tuple[int, torch.dtype]] = []
    compute = QuantLinear.compute

    def noted(linear: QuantLinear, x: Tensor, *rest: Any) -> Tensor:
        called.append((len(x), x.dtype))
        return compute(linear, x, *rest)

    monkeypatch.setattr(QuantLinear, "compute", noted)
    config = configure(checkpoint("site"), "bfloat16")
    load(config)
    most = config.scheduler_config.max_num_batched_tokens
    assert {dtype for _, dtype in called} == {torch.bfloat16}
    assert min(called)[0] == 1 and 64 < max(called)[0] <= most
    assert [rows for rows, _ in called].count(1) == 4  # two blocks of four shapes


@pytest.mark.parametrize("value", ["0", "1"])
def test_batch_invariance_of_vllm_is_ours(value: str, checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", value)
    before = has_invariant_rows()
    linear = load(configure(checkpoint("block"), "bfloat16")).model.layers[0].mlp.gate_up_proj
    try:
        assert has_invariant_rows() is (value == "1") and not before
        x = torch.randn(33, 64, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
        whole = linear.quant_method.apply(linear, x)
        assert value == "0" or torch.equal(linear.quant_method.apply(linear, x[20:27]), whole[20:27])
    finally:
        set_invariant_rows(before)


def test_a_linear_is_traced_as_one_operation(checkpoint: Checkpoints) -> None:
    config = configure(checkpoint("block"), "bfloat16")
    linear = load(config).model.layers[0].mlp.gate_up_proj
    x = torch.randn(8, 64).to(torch.bfloat16)
    traced = torch.compile(lambda x: linear.quant_method.apply(linear, x), fullgraph=True, backend="eager")
    assert torch.equal(traced(x), linear.quant_method.apply(linear, x))


# --- several devices


def quantization_of(folder: Path) -> MxrotQuantization:
    found = MxrotQuantization.from_config(json.loads((folder / "config.json").read_text())["quantization_config"])
    found.maybe_update_config(str(folder), hf_config=AutoConfig.from_pretrained(folder))
    found.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    return found


def on_rank(rank: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM believes to be one of `size` processes."""
    import vllm.model_executor.parameter as parameter

    for module in (vllm_linear, parameter):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)


def fill(linear: Any, tensors: dict[str, Tensor], shard: tuple[Any, ...] = ()) -> None:
    """As vLLM's loader does it, from the tensors of one linear of the checkpoint."""
    for name, tensor in tensors.items():
        parameter = linear.get_parameter(name)
        parameter.weight_loader(parameter, tensor, *shard)


def under(folder: Path, prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix + "."): tensor
        for name, tensor in all_tensors(folder).items()
        if name.startswith(prefix + ".")
    }


@pytest.mark.parametrize("kind", ["site", "block", "one-for-all-blocks"])
def test_two_devices_share_inputs_by_blocks(
    kind: str, checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, prefix = checkpoint(kind), "model.layers.0.self_attn.o_proj"
    assert check_for_vllm(folder).plugin.tensor_parallel == (1,)  # down_proj: 96 inputs are three blocks
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    total = torch.zeros(5, 64)
    for rank in (0, 1):
        on_rank(rank, 2, monkeypatch)
        with set_current_vllm_config(configure(folder, "float32")):
            linear = RowParallelLinear(64, 64, bias=False, quant_config=quantization_of(folder), prefix=prefix)
        fill(linear, under(folder, prefix))
        linear.quant_method.process_weights_after_loading(linear)
        total += linear.quant_method.apply(linear, x[:, 32 * rank : 32 * (rank + 1)])
    expected = mxrot.load(folder).get_submodule(prefix)(x)
    assert relative_error(total, expected) < 1e-6


def test_two_devices_share_outputs_by_heads(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, prefix = checkpoint("bias"), "model.layers.1.self_attn"
    own = mxrot.load(folder)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(4))
    for rank in (0, 1):
        on_rank(rank, 2, monkeypatch)
        with set_current_vllm_config(configure(folder, "float32")):
            linear = QKVParallelLinear(
                64, 16, 4, 2, bias=True, quant_config=quantization_of(folder), prefix=f"{prefix}.qkv_proj"
            )
        for part in ("q", "k", "v"):
            fill(linear, under(folder, f"{prefix}.{part}_proj"), (part,))
        linear.quant_method.process_weights_after_loading(linear)
        whole = [own.get_submodule(f"{prefix}.{part}_proj")(x) for part in ("q", "k", "v")]
        expected = torch.cat([part.chunk(2, dim=-1)[rank] for part in whole], dim=-1)
        assert torch.equal(linear.quant_method.apply(linear, x, linear.bias), expected)


def test_half_blocks_are_refused(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint("site")
    on_rank(0, 2, monkeypatch)
    with set_current_vllm_config(configure(folder, "float32")), pytest.raises(ConfigError, match="48 each"):
        RowParallelLinear(96, 64, quant_config=quantization_of(folder), prefix="model.layers.0.mlp.down_proj")


def test_experts_are_refused(checkpoint: Checkpoints) -> None:
    experts = RoutedExperts.__new__(RoutedExperts)
    with pytest.raises(ConfigError, match="experts"):
        quantization_of(checkpoint("site")).get_quant_method(experts, "model.layers.0.mlp.experts")


def test_parts_that_differ_are_refused_and_so_is_what_is_not_known(checkpoint: Checkpoints) -> None:
    config = quantization_of(checkpoint("mixture"))
    linear = torch.nn.Module.__new__(QKVParallelLinear)
    for parts, message in (
        (["q_proj", "k_proj"], None),
        (["q_proj", "o_proj"], "not of one site"),
        (["q_proj", "g_proj"], "g_proj is no linear of this checkpoint"),
    ):
        config.packed_modules_mapping = {"qkv_proj": parts}
        prefix = "model.layers.1.self_attn.qkv_proj"
        if message is None:
            assert config.get_quant_method(linear, prefix).scheme.weights.format.name == "mxfp4"
            continue
        with pytest.raises(ConfigError, match=message):
            config.get_quant_method(linear, prefix)
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "o_proj"]}
    with pytest.raises(ConfigError, match="not quantized alike"):  # o_proj of block 0 is left as it is
        config.get_quant_method(linear, "model.layers.0.self_attn.qkv_proj")


def test_what_has_a_number_for_the_whole_tensor_is_refused(checkpoint: Checkpoints) -> None:
    folder = checkpoint("tensor-scale")
    (stop,) = check_for_vllm(folder).plugin.stops
    assert stop.startswith("weights in nvfp4 have a number for the whole tensor")
    with pytest.raises(ConfigError, match=stop):
        load(configure(folder, "float32"))


def test_a_hub_checkpoint_is_known_by_its_config_alone(checkpoint: Checkpoints) -> None:
    """vLLM gives the id, and files are not here yet."""
    folder = checkpoint("block")
    table = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = MxrotQuantization.from_config(table)
    config.maybe_update_config("owner/name", hf_config=AutoConfig.from_pretrained(folder))
    assert config.scheme == quantization_of(folder).scheme and len(config.transform_names) == 2 * 7
