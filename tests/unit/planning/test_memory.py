"""Estimated memory beside the tensors alive while a small model is quantized, and beside what GPUs reported."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contracts.tiny_configs import config_of
from tests.live_bytes import LiveBytes
from tests.tiny_model import random_windows, write_tiny_model
from tests.unit.checkpoint.folders import recipe
from tests.unit.planning.shapes import DEMO, EARLIER, LLAMA_3_8B, LLAMA_3_70B, run_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from mxrot.calibration import generated_windows, site_weights
from mxrot.models import FAMILIES, read_config
from mxrot.planning import Run, estimate_host_memory, estimate_memory, gigabytes, memory
from mxrot.planning.writing import writing_stages
from mxrot.quantizing.batches import window_groups
from mxrot.quantizing.run import quantize
from mxrot.quantizing.written import manner_of
from mxrot.recipe import Recipe
from mxrot.tuning import TuningCheckpoint

WIDE = {"hidden_size": 256, "intermediate_size": 768, "head_dim": 64}
MANY = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16, "num_hidden_layers": 3}
DEEP = {"hidden_size": 128, "intermediate_size": 1536, "head_dim": 32, "num_hidden_layers": 1}
ALONE = {"calibration__generated": 0.0}
PLAIN = EARLIER | ALONE
BY_SITE = EARLIER | {
    "rounding__dampings": (0.1, 0.3, 1.0),
    "rounding__target_dampings": (1.0, 3.0, 10.0, math.inf),
    "calibration__held_out": 0.125,
}
CHOSEN = {
    "rtn": recipe("rtn"),
    "hadamard": recipe("hadamard"),
    "smoothquant": recipe("smoothquant"),
    "duquant++": recipe("duquant++", transform__steps=4),
    "duquant++-gptq": recipe("duquant++-gptq", transform__steps=4),
    "mxrot": recipe("mxrot", **PLAIN),
    "duquant-mxfp4": recipe("duquant-mxfp4", transform__steps=4),
    "duquant-mxfp4 block": recipe("duquant-mxfp4", transform__steps=4, transform__sharing="block"),
    "target original": recipe("mxrot", **PLAIN, rounding__target="original"),
    "quarot": recipe("quarot"),
    "rotated, to nearest": recipe("rtn", rotation__residual="orthogonal", rotation__value_heads="hadamard"),
    "permuted": recipe("rtn", transform__block=16, permutation__ffn="correlated", permutation__value_heads="balanced"),
    "moments left open": recipe("mxrot", **PLAIN | {"transform__open": 1.0}),
    "target own": recipe("mxrot", **PLAIN, rounding__target="own"),
    "chosen by site": recipe("mxrot", **ALONE | BY_SITE | {"rounding__target_dampings": (1.0, 3.0)}),
    "refitted": recipe("mxrot", **PLAIN, refit__damping=0.01),
    "with a head": recipe("rtn", head__format="mxfp4", head__inputs="mxfp4", head__transform="hadamard"),
}
DEEP_ONES = {
    "moments left open": CHOSEN["moments left open"],
    "one kind of text": CHOSEN["chosen by site"],
    "two kinds": recipe("mxrot", **BY_SITE),
    "two kinds together": recipe("mxrot", **BY_SITE, rounding__folds="windows"),
    "two kinds, target original": recipe("mxrot", **BY_SITE, rounding__target="original"),
    "two kinds, target own": recipe("mxrot", **BY_SITE | {"rounding__target": "own", "rounding__target_dampings": ()}),
    "refitted": CHOSEN["refitted"],
    "refitted, target own": recipe("mxrot", **PLAIN, rounding__target="own", refit__damping=0.01),
    "mxrot": recipe("mxrot"),
    "mxrot, ordered and refitted": recipe("mxrot", permutation={"ffn": "correlated"}, refit__damping=0.01),
}
"""Where the matrices [K, K] of one wide site fill the memory."""


class Nowhere:
    """A store that forgets."""

    tuning_checkpoint: TuningCheckpoint = None  # type: ignore[assignment]
    orders_checkpoint: TuningCheckpoint = None  # type: ignore[assignment]

    def load(self, index: int) -> None:
        return None

    def load_windows(self, purpose: str) -> None:
        return None

    def save_windows(self, *_: Any) -> None: ...

    def save(self, *_: Any) -> None: ...

    def save_rest(self, *_: Any) -> None: ...


def bytes_alive(folder: Path, chosen: Recipe, windows: Tensor | None) -> int:
    """The most bytes of tensors that a run has alive."""
    with LiveBytes() as alive:
        quantize(folder, chosen, windows=windows, store=Nowhere())
    return alive.peak


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize(("sizes", "shape", "tolerance"), [(WIDE, (2, 64), 0.02), (MANY, (24, 256), 0.2)])
def test_the_peak_is_that_of_the_tensors_alive(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    sizes: dict[str, int],
    shape: tuple[int, int],
    tolerance: float,
) -> None:
    """To a hundredth where weights fill the memory; where activations do, what lies between two operations is rough."""
    monkeypatch.setitem(memory.PROCESS_BYTES, "cpu", 0.0)
    monkeypatch.setattr(memory, "KEPT_SHARE", 0.0)
    chosen = CHOSEN[name]
    folder = write_tiny_model(tmp_path / "tiny", **sizes)
    windows = None if chosen.is_data_free else random_windows(*shape)
    run = run_of(read_config(folder), chosen, *shape)
    assert estimate_memory(run).peak.total == pytest.approx(bytes_alive(folder, chosen, windows), rel=tolerance)


@pytest.mark.parametrize("name", DEEP_ONES)
def test_one_wide_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(memory.PROCESS_BYTES, "cpu", 0.0)
    monkeypatch.setattr(memory, "KEPT_SHARE", 0.0)
    chosen = DEEP_ONES[name]
    folder = write_tiny_model(tmp_path / "tiny", **DEEP)
    peak = estimate_memory(run_of(read_config(folder), chosen, 8, 64)).peak
    assert peak.name.startswith("down: ")
    assert peak.total == pytest.approx(bytes_alive(folder, chosen, random_windows(8, 64)), rel=0.02)


def test_groups_of_windows_are_those_of_a_run() -> None:
    run = run_of(DEMO, DEEP_ONES["two kinds"], 20, 128)
    counted = {name: 128 * len(places) for name, places in (window_groups(40, 20, 0.125) or {}).items()}
    assert run.groups == counted and run.kinds == 2 and run.fitted_tokens == 2 * 18 * 128
    alone = run_of(DEMO, CHOSEN["mxrot"], 20, 128)
    assert alone.groups == {"": 20 * 128} and alone.kinds == 1 and alone.fitted_tokens == alone.tokens


@pytest.mark.parametrize("first", ["uniform", "both", "model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperatures", [(1.0,), (0.7, 1.0)])
def test_text_that_the_model_writes(
    tmp_path: Path, first: str, dtype: torch.dtype, temperatures: tuple[float, ...]
) -> None:
    """Many sequences of a large vocabulary, whose logits fill the memory; on a CPU a model computes in float32."""
    chosen = recipe("mxrot", calibration__first=first, calibration__temperatures=temperatures)
    folder = write_tiny_model(tmp_path / "tiny", vocab_size=8192)
    run = run_of(read_config(folder), chosen, 128, 64, device="cpu" if dtype == torch.float32 else "cuda")
    stages = {stage.name: stage for stage in writing_stages(run)}
    assert ("drawing first tokens" in stages) == (first != "uniform")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    manner = manner_of(chosen.calibration, folder, 0.0)
    with LiveBytes() as alive:
        generated_windows(model, 128, 64, torch.Generator().manual_seed(0), manner=manner)
    assert max(stage.total for stage in stages.values()) == pytest.approx(alive.peak, rel=0.05)


@pytest.mark.parametrize("name", ["hadamard", "smoothquant", "duquant++-gptq", "mxrot", "target original"])
def test_some_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Weights that are too many to be taken together: an eighth of gate and up."""
    monkeypatch.setitem(memory.PROCESS_BYTES, "cpu", 0.0)
    monkeypatch.setattr(memory, "KEPT_SHARE", 0.0)
    together = run_of(read_config(write_tiny_model(tmp_path / "tiny", **WIDE)), CHOSEN[name], 2, 64)
    whole = estimate_memory(together).peak.total
    monkeypatch.setattr(site_weights, "MOST_TOGETHER", 1)
    monkeypatch.setattr(site_weights, "ELEMENTS_AT_ONCE", 192 * 256)
    windows = None if CHOSEN[name].is_data_free else random_windows(2, 64)
    expected = estimate_memory(together).peak.total
    assert expected < 0.8 * whole
    assert expected == pytest.approx(bytes_alive(tmp_path / "tiny", CHOSEN[name], windows), rel=0.03)


def test_a_70b_model_fits_a_gpu_of_40_gb() -> None:
    """Without text of its own, for which the whole model would have to be there. 65 GB before rows were pieces."""
    for name, windows in (("mxrot", 128), ("mxrot", 256), ("duquant++-gptq", 128)):
        chosen = recipe(name, **PLAIN if name == "mxrot" else ALONE)
        peak = estimate_memory(run_of(LLAMA_3_70B, chosen, windows, 2048, torch.bfloat16, "cuda")).peak
        assert 20e9 < peak.total < 31e9 and peak.name.startswith("down: ")


@pytest.mark.parametrize("name", ["phi3", "olmo2", "qwen3", "gemma2", "gemma3", "mixtral", "qwen3_moe"])
def test_other_families(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(memory.PROCESS_BYTES, "cpu", 0.0)
    monkeypatch.setattr(memory, "KEPT_SHARE", 0.0)
    config = config_of(FAMILIES[name], hidden_size=256, intermediate_size=768, vocab_size=256)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).half().save_pretrained(tmp_path)
    chosen = CHOSEN["mxrot"]
    run = run_of(read_config(tmp_path), chosen, 2, 64)
    assert estimate_memory(run).peak.total == pytest.approx(
        bytes_alive(tmp_path, chosen, random_windows(2, 64)), rel=0.02
    )


@pytest.mark.parametrize("name", ["mxrot", "smoothquant"])
def test_scores_that_attention_writes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """They fill the memory where heads times tokens are more than the channels of any linear."""
    monkeypatch.setitem(memory.PROCESS_BYTES, "cpu", 0.0)
    monkeypatch.setattr(memory, "KEPT_SHARE", 0.0)
    config = config_of(FAMILIES["gemma2"], vocab_size=256, max_position_embeddings=1024)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).half().save_pretrained(tmp_path)
    run = run_of(read_config(tmp_path), CHOSEN[name], 3, 1024)
    assert run.shape.score_heads == 4 and run.mask_bytes == 2 * 4 * 1024**2
    peak = estimate_memory(run).peak
    assert peak.terms["one batch"] > 0.8 * peak.total
    assert peak.total == pytest.approx(bytes_alive(tmp_path, CHOSEN[name], random_windows(3, 1024)), rel=0.1)


@pytest.mark.parametrize("name", ["mxrot-tuned", "mxrot-light", "rcp"])
def test_tuning_the_whole_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(memory.PROCESS_BYTES, "cpu", 0.0)
    monkeypatch.setattr(memory, "KEPT_SHARE", 0.0)
    folder = write_tiny_model(tmp_path / "tiny", **WIDE, num_hidden_layers=3)
    tuning = {"tuning__steps": 2, "tuning__batch_windows": 4, "tuning__generated": 0.0}
    chosen = recipe(name, **ALONE | {"permutation": "none"}, **tuning)
    peak = estimate_memory(run_of(read_config(folder), chosen, 8, 64)).peak
    assert peak.name == "tuning"
    assert peak.total == pytest.approx(bytes_alive(folder, chosen, random_windows(8, 64)), rel=0.2)


MEASURED = {
    # docs/results.md: GB of one H100 or H200, 112 windows of 2048.
    "mxrot": (recipe("mxrot", **EARLIER), 9.0),
    "generated text, half as much": (recipe("mxrot", **EARLIER, calibration__generated=0.5), 7.9),
    "on the text alone": (CHOSEN["mxrot"], 6.3),
    "to nearest": (recipe("mxrot", **PLAIN).changed({"rounding.method": "rtn"}), 3.2),
    "target own": (CHOSEN["target own"], 3.9),
    "target original": (CHOSEN["target original"], 6.0),
    "tokens equal": (recipe("mxrot", **PLAIN, rounding__tokens="equal"), 6.2),
    "mxrot-tuned": (recipe("mxrot-tuned"), 18.8),
}


@pytest.mark.parametrize("label", MEASURED)
def test_the_demo_model_on_a_gpu(label: str) -> None:
    chosen, measured = MEASURED[label]
    run = run_of(DEMO, chosen, 112, 2048, device="cuda", keeps_model=True)
    assert estimate_memory(run).peak.total / 1e9 == pytest.approx(measured, rel=0.15)


def llama(name: str, device: str = "cuda", windows: int = 128, **options: Any) -> Run:
    return run_of(LLAMA_3_8B, recipe(name), windows, 2048, torch.bfloat16, device, **options)


def test_one_block_is_on_the_device_at_a_time() -> None:
    """Twice as many blocks take no more, but where the whole model is there, its embedding and head included."""
    longer = type(LLAMA_3_8B)(**LLAMA_3_8B.to_dict() | {"num_hidden_layers": 64})
    for name in ("rtn", "duquant++-gptq"):
        run = run_of(longer, recipe(name), 128, 2048, torch.bfloat16, "cuda")
        assert estimate_memory(run).peak == estimate_memory(llama(name)).peak
    kept = estimate_memory(llama("rtn", keeps_model=True)).peak.total - estimate_memory(llama("rtn")).peak.total
    assert kept == pytest.approx(31 * 4.25 / 8 * 218.1e6 + 2 * 2 * 128256 * 4096, rel=0.001)


def test_the_terms_of_known_tensors() -> None:
    terms = estimate_memory(llama("duquant++-gptq", windows=64)).peak.terms
    assert terms["hidden states"] == 64 * 2048 * 4096 * 2
    assert "embedding, last norm and head" not in terms
    loading = {stage.name: stage for stage in estimate_memory(llama("mxrot")).stages}["loading"].terms
    assert loading["embedding, last norm and head"] == (2 * 128256 * 4096 + 4096) * 2
    assert terms["the block as it was read"] == 2 * (2 * 4096 + 4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336)
    writing = {stage.name: stage for stage in estimate_memory(llama("mxrot")).stages}["writing calibration text"]
    assert writing.terms["the original model"] == 8030261248 * 2
    assert writing.terms["keys and values"] <= 4e9 < writing.terms["keys and values"] * 1.01


@pytest.mark.parametrize("name", ["duquant++-gptq", "mxrot", "mxrot-tuned"])
def test_a_peak_grows_with_the_text_and_every_term_is_some(name: str) -> None:
    few, many = (estimate_memory(llama(name, "cpu", windows=count)) for count in (64, 128))
    assert few.peak.total < many.peak.total or name == "mxrot-tuned"
    assert all(value > 0 for stage in many.stages for value in stage.terms.values())
    assert many.peak.total == max(sum(stage.terms.values()) for stage in many.stages)


def test_main_memory_beside_a_gpu_holds_no_block() -> None:
    peak = estimate_host_memory(llama("mxrot", windows=16)).peak
    assert 2e9 < peak.total < 6e9 < estimate_memory(llama("mxrot", "cpu", windows=16)).peak.total


def test_states_of_a_long_text_are_beside_the_gpu() -> None:
    """Twice 128 windows, of the quantized and of the original model; a gigabyte of them at most is on the GPU."""
    states = 2 * 128 * 2048 * 4096 * 2
    gpu, host = estimate_memory(llama("mxrot")), estimate_host_memory(llama("mxrot")).peak.terms
    assert host["hidden states"] == host["hidden states of the original"] == states
    assert host["outputs of attention and MLP"] == 4 * states
    assert not any(name in stage.terms for stage in gpu.stages for name in host)
    assert gpu.peak.total < 24e9
    assert "hidden states" not in estimate_host_memory(llama("duquant++-gptq", windows=64)).peak.terms


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 GB"),
        (1.2e6, "0.001 GB"),
        (4.567e8, "0.457 GB"),
        (4.567e9, "4.57 GB"),
        (45.67e9, "45.7 GB"),
        (8e11, "800 GB"),
    ],
)
def test_gigabytes(count: float, shown: str) -> None:
    assert gigabytes(count) == shown
