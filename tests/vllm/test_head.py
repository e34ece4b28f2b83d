"""A quantized head in vLLM: the logits of `mxrot.load`, with a vocabulary that vLLM fills up and splits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.tiny_model import write_tiny_model
from tests.unit.checkpoint.folders import TOKENS, all_tensors, change_shard, recipe, write
from tests.unit.checkpoint.folders import logits as own_logits
from tests.vllm.plain_vllm import configure, load, logits
from tests.vllm.test_plugin import fill, quantization_of, under
from tests.vllm.test_stock import relative_error
from torch import Tensor
from transformers import AutoConfig
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers import vocab_parallel_embedding as vocabulary
from vllm.model_executor.layers.quantization import _CUSTOMIZED_METHOD_TO_QUANT_CONFIG as CUSTOM
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader import weight_utils

import mxrot
from mxrot.checkpoint.files import seen
from mxrot.errors import CheckpointError, ConfigError
from mxrot.formats import TensorQuantizer
from mxrot.kernels import warm_up
from mxrot.kernels.fixed_rows import has_invariant_rows, set_invariant_rows
from mxrot.layers import HeadLinear
from mxrot.marker import IN_VLLM
from mxrot.scheme import SiteScheme
from mxrot.vllm.head import MxrotHeadMethod, most_rows
from mxrot.vllm.linear import MxrotLinearMethod, MxrotQuantization
from mxrot.vllm.plugin import register
from mxrot.vllm.verdict import check_for_vllm

HEADS: dict[str, dict[str, Any]] = {
    "mxint8": {"head__format": "mxint8"},
    "mxfp8": {"head__format": "mxfp8_e4m3", "head__rule": "mse"},
    "mxfp4": {"head__format": "mxfp4", "head__transform": "hadamard"},
    "mxfp6": {"head__format": "mxfp6_e3m2", "head__transform": "hadamard"},
    "mxfp4, inputs too": {"head__format": "mxfp4", "head__inputs": "mxfp4", "head__transform": "hadamard"},
}
TOKENS_OF = 300
"""The vocabulary, which vLLM fills up to 320."""
Folders = Callable[..., Path]


@pytest.fixture(autouse=True, scope="module")
def plugin() -> Iterator[None]:
    register()
    yield
    del CUSTOM[IN_VLLM]
    QUANTIZATION_METHODS.remove(IN_VLLM)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A checkpoint with a head of this name, written when it is first asked for."""
    root = tmp_path_factory.mktemp("heads")

    def make(head: str = "mxint8", name: str = "rtn", tokens: int = TOKENS_OF, tied: bool = False) -> Path:
        source, made = (root / f"{what}-{head}-{name}-{tokens}-{tied}".replace(" ", "") for what in ("source", "made"))
        if not made.exists():
            write_tiny_model(source, torch.bfloat16, vocab_size=tokens, tie_word_embeddings=tied)
            write(source, made, recipe(name, **HEADS[head]))
        return made

    return make


def head_of(folder: Path) -> ParallelLMHead:
    """vLLM's head alone, filled from the checkpoint, on the device that vLLM believes to be."""
    table = AutoConfig.from_pretrained(folder)
    with set_current_vllm_config(configure(folder, "float32")):
        head = ParallelLMHead(
            table.vocab_size, table.hidden_size, quant_config=quantization_of(folder), prefix="lm_head"
        )
    fill(head, under(folder, "lm_head"))
    head.quant_method.process_weights_after_loading(head)
    return head


def states(count: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(6)).to(dtype)


@pytest.mark.parametrize("tied", [False, True], ids=["own", "tied"])
@pytest.mark.parametrize("tokens", [256, TOKENS_OF])
@pytest.mark.parametrize("head", HEADS)
def test_logits_are_ours_bit_for_bit_in_float32(head: str, tokens: int, tied: bool, folder: Folders) -> None:
    made = folder(head, "hadamard" if "inputs" in head else "rtn", tokens, tied)
    assert check_for_vllm(made).plugin.stops == () and check_for_vllm(made).stock.stops
    config = configure(made, "float32")
    model = load(config)
    assert isinstance(model.lm_head.quant_method, MxrotHeadMethod)
    assert isinstance(model.model.layers[0].mlp.down_proj.quant_method, MxrotLinearMethod)
    embedding = model.model.embed_tokens
    assert isinstance(embedding.quant_method, UnquantizedEmbeddingMethod)
    assert torch.equal(embedding.weight[:tokens], all_tensors(made)["model.embed_tokens.weight"].float())
    assert [name for name, _ in model.lm_head.named_parameters(recurse=False)] == []
    found = logits(model, config, TOKENS)
    assert found.shape[-1] == tokens and torch.equal(found, own_logits(mxrot.load(made)))


@pytest.mark.parametrize("kind", ["head-mistral", "head-qwen2", "head-qwen3", "head-phi3"])
def test_other_architectures(kind: str, checkpoint: Callable[[str], Path]) -> None:
    made = checkpoint(kind)
    assert check_for_vllm(made).plugin.stops == ()
    config = configure(made, "float32")
    model = load(config)
    assert isinstance(model.lm_head.quant_method, MxrotHeadMethod)
    assert torch.equal(logits(model, config, TOKENS), own_logits(mxrot.load(made)))


@pytest.mark.parametrize("head", HEADS)
def test_the_head_is_ours_bit_for_bit_in_bfloat16(head: str, folder: Folders) -> None:
    """On the hidden states that it sees in vLLM, and in their type."""
    made = folder(head)
    config = configure(made, "bfloat16")
    model = load(config)
    own = mxrot.load(made, dtype=torch.bfloat16).lm_head
    x = states(9, torch.bfloat16)
    with torch.inference_mode():
        found = model.compute_logits(x)
        assert found.dtype == torch.bfloat16 and torch.equal(found, own(x))
        assert torch.equal(model.logits_processor.get_top_tokens(model.lm_head, x), own(x).argmax(dim=-1))


@pytest.mark.parametrize("head", ["mxint8", "mxfp4/mxfp4"])
def test_the_random_model_of_the_benchmark(head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 96 words, which vLLM fills up to 128. The benchmark finds what computes head and linears."""
    monkeypatch.syspath_prepend(str(Path(mxrot.__file__).parents[2] / "benchmarks"))
    shape = ["--blocks", "2", "--hidden", "64", "--ffn", "128", "--heads", "4", "--kv-heads", "2", "--vocabulary", "96"]
    assert import_module("serving_random").main([str(tmp_path), *shape, "--head", head]) == 0
    made = tmp_path / f"plugin-head-{head.replace('/', '-')}"
    config = configure(made, "float32")
    model = load(config)
    tokens = TOKENS % 96
    assert torch.equal(logits(model, config, tokens), mxrot.load(made)(tokens).logits)
    runner = SimpleNamespace(worker=SimpleNamespace(model_runner=SimpleNamespace(get_model=lambda: model)))
    engine = SimpleNamespace(llm_engine=SimpleNamespace(model_executor=SimpleNamespace(driver_worker=runner)))
    worker = import_module("serving_worker")
    assert worker.head_of(engine) == "MxrotHeadMethod, plain" and worker.kernel_of(engine) == "MxrotLinearMethod"


def test_rows_without_a_token_give_zero(folder: Folders) -> None:
    head = head_of(folder("mxfp8"))
    found = head.quant_method.apply(head, states())
    assert found.shape == (5, 320) and not found[:, TOKENS_OF:].any() and found[:, :TOKENS_OF].all()


@pytest.mark.parametrize(("tokens", "size"), [(256, 2), (TOKENS_OF, 2), (TOKENS_OF, 4), (130, 4)])
@pytest.mark.parametrize("head", ["mxint8", "mxfp4, inputs too"])
def test_devices_share_the_vocabulary(
    head: str, tokens: int, size: int, folder: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 130 tokens on four devices, the last one has none."""
    made = folder(head, tokens=tokens)
    own = mxrot.load(made).lm_head
    x = states()
    parts = []
    for rank in range(size):
        monkeypatch.setattr(vocabulary, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        monkeypatch.setattr(vocabulary, "get_tensor_model_parallel_world_size", lambda: size)
        part = head_of(made)
        parts.append(part.quant_method.apply(part, x))
        assert parts[-1].shape == (5, (tokens + 63) // 64 * 64 // size)
    whole = torch.cat(parts, dim=-1)[:, :tokens]  # as LogitsProcessor gathers and cuts them
    assert relative_error(whole, own(x)) < 1e-6


@pytest.mark.parametrize("head", ["mxfp8", "mxfp4, inputs too"])
def test_a_bias_is_added_after_the_sums(head: str, folder: Folders) -> None:
    made = head_of(folder(head))
    bias = torch.randn(320, generator=torch.Generator().manual_seed(7))
    x = states(dtype=torch.bfloat16)
    exact = made.quant_method.apply(made, x.float()) + bias
    assert torch.equal(made.quant_method.apply(made, x, bias), exact.to(torch.bfloat16))


@pytest.mark.parametrize("value", ["0", "1"])
def test_batch_invariance_of_vllm_covers_it(value: str, folder: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", value)
    before = has_invariant_rows()
    head = head_of(folder("mxfp4"))
    try:
        assert has_invariant_rows() is (value == "1") and not before
        x = states(33)
        whole = head.quant_method.apply(head, x)
        assert value == "0" or torch.equal(head.quant_method.apply(head, x[20:27]), whole[20:27])
    finally:
        set_invariant_rows(before)


@pytest.mark.parametrize("head", ["mxint8", "mxfp4, inputs too"])
def test_it_is_traced_as_one_operation(head: str, folder: Folders) -> None:
    made, x = head_of(folder(head)), states(8)
    traced = torch.compile(lambda x: made.quant_method.apply(made, x), fullgraph=True, backend="eager")
    assert torch.equal(traced(x), made.quant_method.apply(made, x))


def test_its_kernels_are_compiled_for_as_many_rows_as_there_are_requests(
    folder: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of all tokens of a step would take gigabytes."""
    monkeypatch.setattr(warm_up, "compiles", lambda device: True)
    monkeypatch.setattr(warm_up, "_warm", set())
    called: list[tuple[int, torch.dtype]] = []
    compute = HeadLinear.compute

    def noted(linear: HeadLinear, x: Tensor, *rest: Any) -> Tensor:
        called.append((len(x), x.dtype))
        return compute(linear, x, *rest)

    monkeypatch.setattr(HeadLinear, "compute", noted)
    config = configure(folder("mxint8"), "bfloat16")
    config.scheduler_config.max_num_seqs = 48
    assert config.scheduler_config.max_num_batched_tokens > 48
    load(config)
    assert {dtype for _, dtype in called} == {torch.bfloat16}
    assert (min(called)[0], max(called)[0]) == (1, 48)


@pytest.mark.parametrize(("speculative", "rows"), [(0, 48), (1, 96), (3, 100)])
def test_speculative_tokens_want_logits_too(speculative: int, rows: int) -> None:
    scheduler = SimpleNamespace(max_num_seqs=48, max_num_batched_tokens=100)
    config: Any = SimpleNamespace(scheduler_config=scheduler, num_speculative_tokens=speculative)
    assert most_rows(config) == rows


# --- refused


def record(folder: Path, name: str) -> None:
    """Let run.json have the digest of the file as it is now."""
    run = json.loads((folder / "run.json").read_text())
    run["files"][name] = vars(seen(folder / name))
    (folder / "run.json").write_text(json.dumps(run))


def test_a_head_that_config_json_ties_is_refused(folder: Folders, tmp_path: Path) -> None:
    made = shutil.copytree(folder(), tmp_path / "tied")
    table = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(table | {"tie_word_embeddings": True}))
    record(made, "config.json")
    with pytest.raises(CheckpointError, match="tie_word_embeddings is true"):
        load(configure(made, "float32"))
    head = head_of(folder())  # as of a hub checkpoint, whose files are not here when vLLM asks
    with pytest.raises(ConfigError, match=r"^lm_head: config.json says tie_word_embeddings"):
        head.tie_weights(torch.nn.Embedding(TOKENS_OF, 64))


@pytest.mark.parametrize(
    ("change", "is_recorded", "message"),
    [
        (lambda tensors: tensors["lm_head.weight_scale"].fill_(255), False, "its SHA-256 is not the one in run.json"),
        (lambda tensors: tensors.pop("lm_head.weight_scale"), True, "lm_head.weight_scale: is missing"),
        (lambda tensors: tensors.update({"lm_head.weight": torch.zeros(1)}), True, "has no place for this tensor"),
        (lambda tensors: tensors.update({"lm_head.weight_packed": torch.zeros(9).byte()}), True, "expected shape"),
    ],
)
def test_a_damaged_head_is_refused_before_weights_are_read(
    change: Callable[[dict[str, Tensor]], None],
    is_recorded: bool,
    message: str,
    folder: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = shutil.copytree(folder(), tmp_path / "damaged")
    shards = sorted(made.glob("*.safetensors"))
    (shard,) = (path for path in shards if b"lm_head" in path.read_bytes())
    change_shard(made, shards.index(shard), change)
    if is_recorded:
        record(made, shard.name)
        record(made, "model.safetensors.index.json")
    monkeypatch.setattr(weight_utils, "safe_open", None)
    with pytest.raises(CheckpointError, match=message):
        load(configure(made, "float32"))


def test_another_name_of_the_head_is_refused(folder: Folders) -> None:
    made = folder()
    with (
        set_current_vllm_config(configure(made, "float32")),
        pytest.raises(ConfigError, match=r"^model.lm_head: the quantized head of this checkpoint is lm_head"),
    ):
        ParallelLMHead(TOKENS_OF, 64, quant_config=quantization_of(made), prefix="model.lm_head")


def test_a_head_with_a_number_for_the_whole_tensor_is_refused(folder: Folders) -> None:
    """mxrot writes none."""
    made = folder()
    config = quantization_of(made)
    weights = TensorQuantizer.of("nvfp4")
    config.scheme = replace(config.scheme, head=SiteScheme(weights))
    with (
        set_current_vllm_config(configure(made, "float32")),
        pytest.raises(ConfigError, match=r"^lm_head: weights in nvfp4 have a number for the whole tensor"),
    ):
        ParallelLMHead(TOKENS_OF, 64, quant_config=config, prefix="lm_head")


def test_a_hub_checkpoint_is_known_by_its_config_alone(folder: Folders) -> None:
    made = folder("mxfp4")
    table = json.loads((made / "config.json").read_text())["quantization_config"]
    config = MxrotQuantization.from_config(table)
    config.maybe_update_config("owner/name", hf_config=AutoConfig.from_pretrained(made))
    assert config.scheme == quantization_of(made).scheme and config.scheme.head is not None
