import json
from pathlib import Path

from tests.tiny_model import write_tiny_model
from typer.testing import CliRunner

from mxrot import cli
from mxrot.bench import QuantizeRow, quantize_table


def test_the_command_times_each_recipe(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    text = tmp_path / "text.txt"
    text.write_text("some words, and then some other words. " * 100)
    options = ["--recipes", "rtn,mxrot", "--calib", str(text), "--samples", "2", "--seq-len", "32", "--repeats", "1"]
    path = tmp_path / "times.json"
    arguments = ["bench", "quantize", str(model), *options, "--device", "cpu", "--json", str(path)]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())["rows"]
    assert [row["recipe"] for row in rows] == ["rtn", "mxrot"]
    assert all(len(row["seconds"]) == 2 and len(row["blocks"]) == 2 for row in rows)
    assert rows[0]["windows"] is None and rows[1]["windows"] == [4, 32]  # two of them written by the model


def test_the_first_run_stands_apart() -> None:
    row = QuantizeRow("mxrot", (4, 32), [9.0, 1.0, 2.0], [0.25, 0.5], 3 * 10**9)
    cells = [next(iter(column.cells)) for column in quantize_table([row]).columns]
    assert cells == ["mxrot", "4 x 32", "9.00", "1.00 2.00", "0.75", "3.00"]
