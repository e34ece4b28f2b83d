"""Attention to a packed cache, timed; on a CPU by the plain code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from mxrot import cli
from mxrot.bench import HeadShapes, bench_cache, cache, cache_scheme, sizes_of

CPU = torch.device("cpu")
SHAPES = HeadShapes(4, 2, 64)


@pytest.mark.parametrize(
    ("name", "transform"), [("mxfp4", "hadamard"), ("mxfp8", "none"), ("int4", "second-moment"), ("int2", "hadamard")]
)
def test_all_ways_are_measured(name: str, transform: str) -> None:
    told: list[str] = []
    rows = bench_cache(CPU, cache_scheme(name, transform, 64), sizes_of([1, 2], [9]), SHAPES, told.append)
    full = cache_scheme(name, "none", 64).keys.format
    kernels = [cache.BASELINE, f"attention to {full.name}", cache.OWN_APPEND, f"keys and values written as {full.name}"]
    assert [row.kernel for row in rows] == kernels * 2 and len(told) == 8
    assert all(row.holds and row.seconds is not None for row in rows)
    assert [row.shape for row in rows[::2]] == [(1, 9), (1, 1), (2, 9), (2, 1)]
    # 128 numbers of a token in each of two heads, in 16 bits and in those of the format.
    assert rows[0].bytes == 2 * 9 * 128 * 2
    zero_points = 0 if full.element.is_signed else 64 // full.block_in(64)
    stored = full.bits_in(64) + zero_points * (8 - full.bits)  # each has a byte of its own
    assert rows[1].bytes == 9 * 2 * 2 * stored / 8


def test_wrong_attention_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    own = cache.decode_attention

    def wrong(query: Tensor, cached: cache.CachedTokens, length: int, *more: object) -> Tensor:
        return own(query, cached, length - 1, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(cache, "decode_attention", wrong)
    rows = bench_cache(CPU, cache_scheme("mxfp4", "none", 64), [(1, 9)], SHAPES)
    assert [row.seconds is None for row in rows] == [False, True, False, False] and not rows[1].holds


def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    shape = ["--heads", "4", "--kv-heads", "2", "--width", "64", "--device", "cpu"]
    options = ["--kv", "mxfp8", "--batch", "1,2", "--context", "8", "--json", str(path)]
    result = CliRunner().invoke(cli.app, ["bench", "cache", *shape, *options])
    assert result.exit_code == 0, result.output
    written = json.loads(path.read_text())
    assert len(written["rows"]) == 8 and written["cache"].startswith("keys mxfp8_e4m3 even under hadamard")
    for wrong in (["--kv", "x"], ["--batch", "1,-2"], ["--kv-transform", "x"], ["--kv-heads", "3"], ["--width", "48"]):
        assert CliRunner().invoke(cli.app, ["bench", "cache", *shape, *wrong]).exit_code == 2, wrong
