from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mxrot import cli
from mxrot.bench import bench_look_up, look_up
from mxrot.bench.tables import speed_ratios
from mxrot.bench.timing import seconds_of_each
from mxrot.kernels import Choice
from mxrot.kernels.plain import IntegerRows, looked_up, plain_look_up_product

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_on_a_cpu_there_is_the_plain_twin() -> None:
    told: list[str] = []
    rows = bench_look_up(CPU, [(16, 256)], [2], told.append)
    assert [row.kernel for row in rows] == ["bf16 product", "W2A4, looked up, plain"] and len(told) == 2
    assert all(row.holds and row.seconds is not None and row.shape == (2, 16, 256) for row in rows)
    assert rows[1].bytes == 16 * 256 * 2.375 / 8 + 2 * 2 * (16 + 256) and set(speed_ratios(rows)) == {
        (row.kernel, row.shape) for row in rows
    }


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter where there is no GPU: it is slow, and cuts bfloat16 off instead of rounding it."""
    monkeypatch.setattr(look_up, "TYPE", torch.float16)
    monkeypatch.setattr(look_up, "copies_for", lambda size: 1)
    monkeypatch.setattr(look_up, "seconds_of_each", partial(seconds_of_each, repeats=2))
    monkeypatch.setattr(look_up, "choose_look_up", lambda *_: Choice("look-up", "a test says so"))


@pytest.mark.usefixtures("with_kernels")
def test_the_kernels_are_right() -> None:
    rows = bench_look_up(DEVICE, [(5, 256)], [1])
    assert [row.kernel for row in rows][1:] == ["W2A4, looked up", "W2A4, looked up, without the quantizer"]
    assert all(row.error == 0 and row.seconds is not None for row in rows)


@pytest.mark.usefixtures("with_kernels")
def test_a_kernel_that_fails_its_check_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:

    def off(*arguments: object) -> torch.Tensor:
        found = plain_look_up_product(*arguments)  # type: ignore[arg-type]
        found[0, 0] += 1
        return found

    monkeypatch.setattr(look_up, "plain_look_up_product", off)
    rows = bench_look_up(DEVICE, [(5, 256)], [1])
    assert [row.seconds is None for row in rows] == [False, True, True] and rows[1].error == 0.2


def test_no_sum_is_rounded() -> None:
    """What the check rests on: of the largest width that is measured, in units of the smallest scale, and with room."""
    weight = look_up.random_weight(64, 14336, CPU)
    x = IntegerRows(torch.randint(-7, 8, (4, 14336), dtype=torch.int8), torch.ones(4, 1))
    found = plain_look_up_product(x, weight.packed, weight.scales, weight.levels, torch.float32)
    values = (looked_up(weight.packed, weight.levels).double() * weight.scales.double()[..., None]).flatten(1)
    assert torch.equal(found.double(), x.codes.double() @ values.T) and (found.abs() * 2**10 < 2**24 / 8).all()


def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    options = ["bench", "kernels", "--lut", "--device", "cpu", "--shape"]
    result = CliRunner().invoke(cli.app, [*options, "16x256", "--rows", "1", "--json", str(path)])
    assert result.exit_code == 0, result.output
    table = json.loads(path.read_text())
    assert [row["kernel"] for row in table["rows"]] == ["bf16 product", "W2A4, looked up, plain"]
    assert table["ceilings"]["copy"] > 1e8
    result = CliRunner().invoke(cli.app, [*options, "16x96"])
    assert result.exit_code == 2 and "K a multiple of 128" in result.output
