"""`torchrun -m mxrot quantize` on two nodes of one process each, which meet over loopback, and on one node of two."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tests.tiny_model import write_tiny_model
from tests.unit.checkpoint.folders import digests, without_run

MOST_SECONDS = 180.0


def launched(folder: Path, output: str, *groups: list[str]) -> list[str]:
    """What torchrun has said in each of several groups of processes, started side by side, that quantize together."""
    words = ["-m", "mxrot", "quantize", str(folder / "tiny"), "-o", str(folder / output), "--device", "cpu"]
    words += ["--calib", str(folder / "text.txt"), "--samples", "8", "--seq-len", "32", "--recipe", "duquant++-gptq"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    going = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *group, *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for group in groups
    ]
    try:
        said = [one.communicate(timeout=MOST_SECONDS)[0] for one in going]
    finally:
        for one in going:
            one.kill()
    assert [one.returncode for one in going] == [0] * len(groups), said
    return said


@pytest.mark.slow
def test_two_nodes_write_what_one_does(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "quantize"]
    node = ["--nnodes", "2", "--nproc-per-node", "1", *meeting]
    said = launched(tmp_path, "nodes", node, node)
    assert sum("2 blocks with duquant++-gptq" in one for one in said) == 1, "one process of one node speaks"
    launched(tmp_path, "node", ["--standalone", "--nproc-per-node", "2"])
    assert without_run(digests(tmp_path / "nodes")) == without_run(digests(tmp_path / "node"))
