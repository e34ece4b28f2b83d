from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.tiny_model import tiny_config
from torch import Tensor

from mxrot.bench import ModelRow, Seconds, Works, bench_model, breakdown_tables, cache_scheme, model
from mxrot.bench.breakdown import (
    ATTENTION,
    HEAD,
    PRODUCTS,
    QUANTIZERS,
    REST,
    UNKNOWN,
    Breakdown,
    Part,
    break_down,
    in_ranges,
    parts_of_steps,
)
from mxrot.kernels import dispatch
from mxrot.kernels import linear as paths
from mxrot.layers import QuantLinear
from mxrot.recipe import load_recipe

CPU = torch.device("cpu")
CONFIG = tiny_config(architectures=["LlamaForCausalLM"], head_dim=32)
STEP = Seconds(1.0, 1.0, 1.0)


@pytest.fixture(autouse=True)
def without_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")


def launches(found: Breakdown | None) -> dict[str, int]:
    assert found is not None
    return {kind: part.launches for kind, part in found.parts.items()}


def test_the_operators_of_a_token() -> None:
    """On a CPU: a product is one operator, and what is not quantized is the same in both models."""
    plain = model.random_model(CONFIG, CPU)
    whole = launches(break_down(model.token_step(plain, 8), STEP, plain))
    assert whole == {PRODUCTS: 14, QUANTIZERS: 0, ATTENTION: 2, HEAD: 1, REST: whole[REST]} and whole[REST] > 20
    quantized = model.random_quantized_model(CONFIG, CPU, load_recipe("mxrot"))
    found = launches(break_down(model.token_step(quantized, 8), STEP, quantized))
    assert found[PRODUCTS] >= 14 and found[QUANTIZERS] > 8
    for kind in (ATTENTION, HEAD, REST):
        assert found[kind] == whole[kind], kind


@pytest.mark.parametrize("changes", [{"transform.block": 64}, {"transform.method": "dual"}])
def test_all_stages_of_a_transform_are_the_quantizer_s(changes: dict[str, Any]) -> None:
    """Leading stages and matrices of other blocks than the format's add nothing to the products."""
    config = tiny_config(architectures=["LlamaForCausalLM"], intermediate_size=128)
    counts = []
    for more in ({}, changes):
        quantized = model.random_quantized_model(config, CPU, load_recipe("hadamard").changed(more))
        counts.append(launches(break_down(model.token_step(quantized, 8), STEP, quantized)))
    assert counts[1][QUANTIZERS] > counts[0][QUANTIZERS]
    for kind in (PRODUCTS, ATTENTION, HEAD, REST):
        assert counts[1][kind] == counts[0][kind], kind


@pytest.mark.parametrize("more", [{}, {"head.inputs": "mxfp4"}])
def test_all_of_a_quantized_head_is_the_head_s(more: dict[str, Any]) -> None:
    """Its transform and the quantizer of its inputs, too: the other parts are those of a model without it."""
    counts = []
    for changes in ({}, {"head.format": "mxfp4", "head.transform": "hadamard"} | more):
        quantized = model.random_quantized_model(CONFIG, CPU, load_recipe("rtn").changed(changes))
        counts.append(launches(break_down(model.token_step(quantized, 8), STEP, quantized)))
    assert counts[0][HEAD] == 1 < counts[1][HEAD]
    for kind in (PRODUCTS, QUANTIZERS, ATTENTION, REST):
        assert counts[1][kind] == counts[0][kind], kind


def test_attention_to_a_packed_cache_and_writes_to_it() -> None:
    """What is written to the cache is not attention's."""
    plain = model.random_model(CONFIG, CPU)
    dense = launches(break_down(model.token_step(plain, 8), STEP, plain))
    packed = launches(break_down(model.packed_token_step(plain, 8, cache_scheme("mxfp4", "hadamard", 32)), STEP, plain))
    assert packed[ATTENTION] > dense[ATTENTION] and packed[REST] > dense[REST]
    assert (packed[PRODUCTS], packed[HEAD]) == (14, 1)


def test_ranges_end() -> None:
    quantized = model.random_quantized_model(CONFIG, CPU, load_recipe("rtn"))
    linear, own = quantized.get_submodule("model.layers.0.mlp.down_proj"), F.scaled_dot_product_attention
    assert isinstance(linear, QuantLinear)
    with pytest.raises(KeyError), in_ranges(quantized):
        assert "forward" in vars(linear) and F.scaled_dot_product_attention is not own
        raise KeyError
    assert "forward" not in vars(linear) and F.scaled_dot_product_attention is own


def quantize(x: Tensor, *_: Any, **__: Any) -> Tensor:
    """One operator, in the place of the kernel of a quantizer."""
    return torch.neg(x)


def product(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    """Two operators, in the place of the kernel of a product."""
    return torch.zeros(*x.shape[:-1], len(codes), dtype=torch.bfloat16).abs_()


def count_inputs(linears: list[QuantLinear]) -> int:
    """How many inputs are quantized: those of sites, and of linears without one."""
    return len({id(linear.site or linear) for linear in linears})


@pytest.mark.parametrize(
    ("path", "quantizer"),
    [
        ("matrix units", "rotate_quantize_e5m2"),
        ("fp8", "rotate_quantize_e5m2"),
        ("block scales", "rotate_quantize_packed"),
    ],
)
def test_quantizers_of_the_paths_of_linears(monkeypatch: pytest.MonkeyPatch, path: str, quantizer: str) -> None:
    """With operators in the place of kernels."""
    pytest.importorskip("triton")
    from mxrot.kernels.fused import block_scaled, lift, rotate_quantize, skinny

    quantized = model.random_quantized_model(CONFIG, CPU, load_recipe("mxrot"))
    linears = [module for module in quantized.modules() if isinstance(module, QuantLinear)]
    monkeypatch.setattr(dispatch, "choose_path", lambda *_: dispatch.Choice(path, ""))
    monkeypatch.setattr(rotate_quantize, quantizer, quantize)
    monkeypatch.setattr(skinny, "skinny_product", product)
    monkeypatch.setattr(block_scaled, "block_scaled_product", product)
    monkeypatch.setattr(lift, "lift_weights", lambda codes, *_: codes)
    monkeypatch.setattr(paths, "fp8_product", product)
    for linear in linears:
        for name in ("row_exponents", "lifted_scales", "swizzled"):
            setattr(linear, name, torch.zeros(linear.out_features, dtype=torch.int32))
    found = launches(break_down(model.token_step(quantized, 8), STEP, quantized))
    assert found[QUANTIZERS] == count_inputs(linears)
    assert found[PRODUCTS] >= 2 * count_inputs(linears)


def test_quantizers_of_looked_up_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with integers, which each linear makes for itself, and with matrices that are applied before."""
    pytest.importorskip("triton")
    from mxrot.kernels.fused import look_up, quantize_rows

    monkeypatch.setattr(dispatch, "choose_look_up", lambda *_: dispatch.Choice("look-up", ""))
    monkeypatch.setattr(quantize_rows, "quantize_rows", quantize)
    monkeypatch.setattr(look_up, "look_up_product", product)
    more = []
    for changes in ({}, {"transform.method": "hadamard"}):
        quantized = model.random_quantized_model(CONFIG, CPU, load_recipe("rcp-unrotated").changed(changes))
        linears = [module for module in quantized.modules() if isinstance(module, QuantLinear)]
        found = launches(break_down(model.token_step(quantized, 8), STEP, quantized))
        assert found[PRODUCTS] >= 2 * len(linears) > 0
        more.append(found[QUANTIZERS] - len(linears))
    assert more[0] == 0 < more[1]


def user(start: float, end: float, name: str) -> dict[str, Any]:
    return {"cat": "user_annotation", "name": name, "ts": start, "dur": end - start}


def launched(at: float, start: float, end: float, place: int, api: str = "cuda_runtime") -> Iterator[dict[str, Any]]:
    """A kernel that was launched at `at`, and runs from start to end."""
    yield {"cat": api, "name": "launch", "ts": at, "dur": 1, "args": {"correlation": place}}
    yield {"cat": "kernel", "name": "k", "ts": start, "dur": end - start, "args": {"correlation": place}}


def test_kernels_belong_to_the_range_in_which_they_were_launched() -> None:
    """Not to that in which they run. The innermost counts, unless it is in the head; launches by the driver, too."""
    events = [
        *launched(1, 5, 9, 1),  # before the first step
        user(10, 100, "mxrot: step"),
        user(12, 14, "someone else's"),
        *launched(13, 20, 30, 2),
        user(20, 40, f"mxrot: {PRODUCTS}"),
        user(21, 25, f"mxrot: {QUANTIZERS}"),
        *launched(22, 41, 43, 3, "cuda_driver"),
        *launched(26, 43, 53, 4),
        user(41, 50, f"mxrot: {HEAD}"),
        user(41.5, 43, f"mxrot: {QUANTIZERS}"),
        *launched(42, 60, 75, 5),
        {"cat": "gpu_memset", "name": "m", "ts": 80, "dur": 2, "args": {"correlation": 6}},
        {"cat": "cuda_runtime", "name": "memset", "ts": 60, "dur": 1, "args": {"correlation": 6}},
        {"cat": "cpu_op", "name": "aten::mm", "ts": 26, "dur": 3},
        *launched(105, 106, 107, 7),  # between two steps
        user(110, 150, "mxrot: step"),
        *launched(111, 112, 115, 8),
    ]
    first, second = parts_of_steps(events, True)
    seconds = {kind: (round(1e6 * part.seconds), part.launches) for kind, part in first.items()}
    assert seconds == {REST: (12, 2), QUANTIZERS: (2, 1), PRODUCTS: (10, 1), HEAD: (15, 1)}
    assert second == {REST: Part(3e-6, 1)}


def test_time_that_kernels_share_counts_once() -> None:
    """A kernel that starts while the one before it runs waits for it, at least in the end."""
    events = [user(0, 100, "mxrot: step"), user(10, 20, f"mxrot: {QUANTIZERS}")]
    events += [*launched(1, 30, 50, 1), *launched(12, 42, 53, 2), *launched(22, 53, 60, 3), *launched(23, 54, 58, 4)]
    (found,) = parts_of_steps(events, True)
    assert {kind: round(1e6 * part.seconds, 6) for kind, part in found.items()} == {REST: 27, QUANTIZERS: 3}
    assert found[REST].launches == 3


def test_a_kernel_without_a_launch_is_of_no_kind() -> None:
    kernel = {"cat": "kernel", "name": "k", "ts": 30, "dur": 5, "args": {"correlation": 9}}
    (found,) = parts_of_steps([user(0, 100, "mxrot: step"), user(20, 40, f"mxrot: {HEAD}"), kernel], True)
    assert found == {UNKNOWN: Part(5e-6, 1)}


def test_a_profiler_that_records_nothing_gives_no_breakdown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mxrot.bench.breakdown.parts_of_steps", lambda *_: [{}] * 7)
    told: list[str] = []
    rows = bench_model(CONFIG, load_recipe("rtn"), CPU, Works(None, (8,), None, None, (1,), True), told.append)
    assert [row.breakdown for row in rows] == [None, None] and len(told) == 4
    assert told[-1] == "rtn, token after 8, bfloat16: torch.profiler recorded no kernels"
    assert breakdown_tables(rows) == []


def test_breakdowns_of_a_benchmark() -> None:
    """One for each token, of a step that is not compiled; none for a prompt."""
    torch.compiler.reset()
    rows = bench_model(CONFIG, load_recipe("rtn"), CPU, Works(16, (8,), None, "eager", (1, 2), True))
    assert [row.breakdown is None for row in rows] == [True, False, False] * 2
    for row in rows:
        found = row.breakdown
        if found is not None:
            assert row.seconds is not None and found.step != row.seconds
            unused = [kind for kind, part in found.parts.items() if not part.seconds]
            assert unused == ([QUANTIZERS] if row.model == "bf16" else [])
            assert row.as_record()["breakdown"]["parts"][ATTENTION]["launches"] == 2
    tables = breakdown_tables(rows)
    titles = [f"{work}, not compiled: us (launches)" for work in ("token after 8", "2 tokens after 8 each")]
    assert [table.title for table in tables] == titles
    assert list(tables[0].columns[0].cells)[-3:] == ["idle", "the step", "the step, compiled"]


def test_the_table_of_a_breakdown() -> None:
    """Models side by side; what is idle is the step without its kernels."""
    parts = {PRODUCTS: Part(2e-6, 3), QUANTIZERS: Part(), ATTENTION: Part(1e-6, 1), HEAD: Part(), REST: Part(4e-6, 9)}
    step = Seconds(1e-5, 1e-5, 1e-5)
    overlapping = Breakdown(Seconds(6e-6, 6e-6, 6e-6), parts | {UNKNOWN: Part(1e-6, 1)})
    rows = [
        ModelRow("bf16", "token", step, 1, "bfloat16", 1, 1, Breakdown(step, parts)),
        ModelRow("rtn", "token", overlapping.step, 1, "bfloat16", 1, 1, overlapping),
    ]
    (table,) = breakdown_tables(rows)
    kinds, plain, quantized = (list(column.cells) for column in table.columns)
    assert kinds == [PRODUCTS, QUANTIZERS, ATTENTION, HEAD, REST, UNKNOWN, "idle", "the step"]
    assert plain == ["2.0 (3)", "", "1.0 (1)", "", "4.0 (9)", "", "3.0", "10.0"]
    assert quantized == ["2.0 (3)", "", "1.0 (1)", "", "4.0 (9)", "1.0 (1)", "-2.0", "6.0"]
