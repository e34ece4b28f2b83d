from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mxrot import cli
from mxrot.bench import KernelRow, Seconds, bench_kernels, ceilings, geometric_means, kernel_table, kernels, seconds_of
from mxrot.bench.timing import copies_for

CPU = torch.device("cpu")


def test_calls_are_made_in_turn_and_timed() -> None:
    made: list[int] = []
    found = seconds_of([lambda: made.append(1), lambda: made.append(2)], CPU, repeats=4)
    assert made == [1, 2] * 5  # the first round is not counted
    assert 0 < found.low <= found.median <= found.high < 1e-3


def test_small_operands_are_copied_beyond_any_cache() -> None:
    assert copies_for(1e9) == 1 and copies_for(5e7) == 5 and copies_for(1.0) == 64


@pytest.mark.skipif(torch.cuda.is_available(), reason="has other kernels there")
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
