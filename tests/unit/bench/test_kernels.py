from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from mxrot import cli
from mxrot.bench import (
    KernelRow,
    Seconds,
    bench_kernels,
    best_tiles,
    ceilings,
    geometric_means,
    kernel_table,
    kernels,
    measured_crossovers,
    middle,
    seconds_of,
    timing,
)
from mxrot.bench.timing import copies_for, seconds_of_each
from mxrot.kernels.crossovers import Crossovers
from mxrot.kernels.plain import plain_fp8_product, plain_rotate_quantize_packed

CPU = torch.device("cpu")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_calls_are_made_in_turn_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that each call moves on: by one second in the first round, which is not counted, then by two."""
    made: list[int] = []
    clock = [0.0]

    def call(which: int) -> None:
        made.append(which)
        clock[0] += 1.0 if len(made) <= 2 else 2.0

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    found = seconds_of([lambda: call(1), lambda: call(2)], CPU, repeats=4)
    assert made == [1, 2] * 5
    assert (found.low, found.median, found.high) == (2.0, 2.0, 2.0)


def test_candidates_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    clock = [0.0]

    def call(which: int) -> None:
        made.append(which)
        clock[0] += which

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    found = seconds_of_each([[lambda: call(1)], [lambda: call(2), lambda: call(4)]], CPU, repeats=2)
    assert made == [1, 2, 4] * 3
    assert [seconds.median for seconds in found] == [1.0, 3.0]


def test_small_operands_are_copied_beyond_any_cache() -> None:
    assert copies_for(1e9) == 1 and copies_for(5e7) == 5 and copies_for(1.0) == 64


def test_on_a_cpu_there_is_the_plain_quantizer_and_the_product() -> None:
    told: list[str] = []
    rows = bench_kernels(CPU, [(64, 96)], [4], told.append)
    assert [row.kernel for row in rows] == [
        "rotate_quantize to values, site, even",
        "rotate_quantize to values, site, floor",
        "rotate_quantize by the book, site, floor",
        "rotate_quantize to values, site, rceil",
        "rotate_quantize to values, block, even",
        "bf16 product",
    ]
    assert all(row.holds and row.seconds is not None for row in rows) and len(told) == len(rows)


def test_a_kernel_that_fails_its_check_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    own = kernels.rotate_quantize
    monkeypatch.setattr(kernels, "rotate_quantize", lambda *a: own(*a) * (1 + 2.0**-7))
    rows = bench_kernels(CPU, [(64, 96)], [4])
    assert [row.seconds is None for row in rows] == [True, True, False, True, True, False]
    result = CliRunner().invoke(cli.app, ["bench", "kernels", "--shape", "64x96", "--rows", "4", "--device", "cpu"])
    assert result.exit_code == 1 and "CHECK FAILED" in result.output


def test_the_book_is_right_but_for_ties() -> None:
    """It takes the smaller of two equally near values, the rounding of the formats the even code."""
    x, matrices = torch.randn(50, 96), torch.eye(32)[None]
    expected = kernels.plain_rotate_quantize(x, matrices, kernels.FORMAT, kernels.get_rule("floor"))
    assert torch.equal(kernels.by_the_book(x, matrices), expected)


def row(kernel: str, shape: tuple[int, ...], seconds: float | None) -> KernelRow:
    times = None if seconds is None else Seconds(seconds, seconds, seconds)
    return KernelRow(kernel, shape, times, 1e6, 1e9, 0.0 if times else 1.0, 0.5, "bf16 product")


def test_speed_is_relative_to_the_product_of_the_same_shape() -> None:
    rows = [
        row("bf16 product", (1, 2, 32), 4e-6),
        row("W4A4", (1, 2, 32), 2e-6),
        row("bf16 product", (1, 4, 32), 8e-6),
        row("W4A4", (1, 4, 32), 1e-6),
        row("broken", (1, 4, 32), None),
        row("quantizer", (1, 32), 1e-6),
    ]
    means = geometric_means(rows)
    assert set(means) == {("W4A4", 1), ("bf16 product", 1)} and math.isclose(means["W4A4", 1], 4.0)
    table = kernel_table(rows, {"copy": 1e12})
    assert list(table.columns[6].cells) == ["1.00", "2.00", "1.00", "8.00", "", ""]
    assert list(table.columns[2].cells)[4] == "CHECK FAILED"


def test_the_command_writes_what_it_found(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    options = ["--shape", "64x96", "--rows", "4", "--device", "cpu", "--json", str(path)]
    result = CliRunner().invoke(cli.app, ["bench", "kernels", *options])
    assert result.exit_code == 0, result.output
    table = json.loads(path.read_text())
    assert table["ceilings"]["copy"] > 1e8 and len(table["rows"]) == 6 and table["rows"][0]["holds"]


@pytest.mark.parametrize("shape", ["4096", "4096x100", "0x64", "axb"])
def test_a_shape_that_is_none(shape: str) -> None:
    result = CliRunner().invoke(cli.app, ["bench", "kernels", "--shape", shape, "--device", "cpu"])
    assert result.exit_code == 2 and f"--shape {shape}" in result.output


def test_the_ceilings_of_a_cpu() -> None:
    found = ceilings(CPU)
    assert set(found) == {"copy", "bf16 product"} and all(value > 1e8 for value in found.values())


@pytest.mark.parametrize("count", [1, 9, 100, 129])
def test_every_way_to_compute_a_linear_on_a_gpu_is_right(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, with the FP8 product's twin in its place."""

    def product(x: Tensor, w: Tensor, scales: Tensor, dtype: torch.dtype, fast: bool = False) -> Tensor:
        return plain_fp8_product(x, w, scales, dtype)

    monkeypatch.setattr(kernels, "fp8_product", product)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    x = torch.randn(count, 96).to(DEVICE, torch.bfloat16)
    matrices = kernels.random_orthogonal(1, 32, torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    rule = kernels.FORMAT.rule()
    weights = [
        plain_rotate_quantize_packed(torch.randn(40, 96).to(DEVICE), None, kernels.FORMAT, rule) for _ in range(2)
    ]
    quantized = kernels.plain_rotate_quantize(x, matrices, kernels.FORMAT, rule)
    names = []
    for name, functions, size in kernels._linears(torch.device("cuda"), x, matrices, weights, print, False):
        names.append(name)
        assert size in (1.0, 17 / 32)
        for function, weight in zip(functions, weights, strict=False):
            exact = kernels._sample(quantized, kernels._dequantized(weight))
            if "lifted" in name or "kept" in name:  # all weights are lifted by the exponents of the first
                exact = exact if weight is weights[0] else exact[:0]
            assert not len(exact) or kernels._error(function(), exact) < 2.0**-7, name
    assert len(names) == (6 if count <= 128 else 4) and kernels.INVARIANT in names


@pytest.mark.parametrize("count", [17, 40])
def test_every_tile_for_middle_rows_is_right(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert middle.covers(count, 256, torch.device("cuda")) and not middle.covers(count, 96, torch.device("cuda"))
    x = torch.randn(count, 256).to(DEVICE, torch.bfloat16)
    matrices = kernels.random_orthogonal(1, 32, torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    rule = kernels.FORMAT.rule()
    weight = plain_rotate_quantize_packed(torch.randn(70, 256).to(DEVICE), None, kernels.FORMAT, rule)
    exact = kernels._sample(
        kernels.plain_rotate_quantize(x, matrices, kernels.FORMAT, rule), kernels._dequantized(weight)
    )
    names = []
    exponents, _ = kernels.lift_exponents(weight.codes, weight.scales, together=True)
    for name, (function,), size in middle.middle_products(x, matrices, [weight], exponents, True, print):
        names.append(name)
        assert size == 17 / 32 and kernels._error(function(), exact) < 2.0**-7, name
    assert len(set(names)) == len(names) > 5
    names = [name for name, *_ in middle.middle_products(x, matrices, [weight], exponents, False, print)]
    assert names == [middle.MIDDLE, f"{middle.MIDDLE}, without the quantizer"]


def test_a_tile_that_cannot_be_launched_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from mxrot.kernels.cuda import middle as cuda
    from mxrot.kernels.fused import middle as fused

    def fail(*arguments: object, **named: object) -> Tensor:
        raise RuntimeError("out of resource: shared memory")

    x, matrices = (value.to(DEVICE, torch.bfloat16) for value in (torch.randn(20, 128), torch.eye(32)[None]))
    weight = plain_rotate_quantize_packed(torch.randn(8, 128), None, kernels.FORMAT, kernels.FORMAT.rule())
    exponents, _ = kernels.lift_exponents(weight.codes, weight.scales)
    monkeypatch.setattr(fused, "middle_product", fail)
    monkeypatch.setattr(cuda, "middle_product", fail)
    monkeypatch.setattr(cuda, "is_there", lambda device: False)
    told: list[str] = []
    assert len(list(middle.middle_products(x, matrices, [weight], exponents, True, told.append))) == 2
    assert told and all("RuntimeError: out of resource: shared memory" in line for line in told)


def test_the_fastest_tile_of_each_shape() -> None:
    rows = [
        row(f"{middle.MIDDLE}, a", (64, 2, 128), 3e-6),
        row(f"{middle.MIDDLE}, b", (64, 2, 128), 2e-6),
        row(f"{middle.MIDDLE}, without the quantizer", (64, 2, 128), 1e-6),
        row(f"{middle.MIDDLE}, broken", (64, 2, 128), None),
        row(middle.MIDDLE, (64, 2, 128), 1e-6),
        row(f"{middle.MIDDLE}, a", (32, 2, 128), 4e-6),
        row(f"{middle.MIDDLE}, a, without the quantizer", (64, 2, 128), 1.5e-6),
        row(f"{middle.MIDDLE}, b, without the quantizer", (64, 2, 128), 1.7e-6),
    ]
    assert best_tiles(rows) == {(64, 2, 128): ("b", 2e-6), (32, 2, 128): ("a", 4e-6)}
    assert best_tiles(rows, alone=True) == {(64, 2, 128): ("a", 1.5e-6)}


def test_tiles_and_lut_exclude_each_other() -> None:
    result = CliRunner().invoke(cli.app, ["bench", "kernels", "--tiles", "--lut", "--device", "cpu"])
    assert result.exit_code == 2 and "--tiles" in result.output


def test_tiles_are_measured_without_quantizers_alone() -> None:
    assert [row.kernel for row in bench_kernels(CPU, [(64, 128)], [20], all_tiles=True)] == ["bf16 product"]


def test_every_output_of_the_quantizer_on_a_gpu_is_right() -> None:
    x, matrices = (value.to(DEVICE, torch.bfloat16) for value in (torch.randn(20, 96), torch.eye(32)[None]))
    rule = kernels.FORMAT.rule()
    outputs = list(kernels._outputs(torch.device("cuda")))
    assert [name for name, *_ in outputs] == ["bf16", "fp8", "fp4"]
    for _, run, twin, _ in outputs:
        found, expected = run(x, matrices, kernels.FORMAT, rule), twin(x, matrices, kernels.FORMAT, rule)
        assert kernels._share_that_differs(found, expected) == 0


def race(
    count: int, packed: float, kept: float | None, lifted: float, shape: tuple[int, int] = (64, 32)
) -> list[KernelRow]:
    """What three ways have taken for so many rows, in seconds."""
    times = {kernels.PACKED: packed, kernels.KEPT: kept, kernels.LIFTED: lifted}
    return [
        KernelRow(name, (count, *shape), None if t is None else Seconds(t, t, t), 1.0, 1.0, 0.0, 1.0)
        for name, t in times.items()
    ]


def test_crossovers_are_where_packed_codes_are_last_the_fastest() -> None:
    rows = [*race(1, 1, 2, 4), *race(16, 2, 1.9, 4), *race(64, 3, 1, 4), *race(128, 5, 2, 4)]
    assert measured_crossovers(rows) == Crossovers(packed=64, kept=1)
    # Once it was slower, being faster with more rows again is chance.
    assert measured_crossovers([*rows, *race(32, 9, 2, 4)]) == Crossovers(packed=16, kept=1)


def test_crossovers_weigh_shapes_by_their_time() -> None:
    small, large = race(16, 2, 1, 1, (64, 32)), race(16, 10, 12, 12, (640, 320))
    assert measured_crossovers([*small, *large]) == Crossovers(packed=16, kept=16)


def test_a_kernel_without_a_speed_is_not_raced() -> None:
    assert measured_crossovers(race(16, 2, None, 3)) is None and measured_crossovers([]) is None
