"""The job scripts of the documentation: parsed, their commands too, and the one for Slurm run with stand-ins."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.tiny_model import write_tiny_model
from typer.main import get_command

from mxrot.commands.app import app

JOBS = Path(__file__).parents[2] / "docs" / "jobs"
SLURM = JOBS / "quantize.slurm"


def parsed(words: list[str]) -> Any:
    """The parameters of an mxrot command; raises for what it would refuse."""
    command: Any = get_command(app)
    with command.make_context("mxrot", [*words]) as context:
        chosen = command.get_command(context, words[0])
        return chosen.make_context(words[0], words[1:], parent=context).params


def test_the_kubernetes_job() -> None:
    (job,) = yaml.safe_load_all((JOBS / "quantize.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and job["spec"]["backoffLimit"] > 0
    (container,) = pod["containers"]
    assert container["command"][-2:] == ["-m", "mxrot"]
    processes = container["command"][container["command"].index("--nproc-per-node") + 1]
    assert int(processes) == container["resources"]["limits"]["nvidia.com/gpu"]
    found = parsed(container["args"])
    assert found["resume"] and found["output"] == Path("/models/llama-3.1-70b-mxfp4")
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert all(isinstance(one.get("value", ""), str) for one in container["env"])


def test_the_slurm_job_is_a_script_with_known_options() -> None:
    subprocess.run(["bash", "-n", str(SLURM)], check=True)
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", SLURM.read_text(), flags=re.MULTILINE))
    assert len(options) == SLURM.read_text().count("#SBATCH")
    known = "job-name nodes ntasks-per-node gpus-per-node cpus-per-task mem time requeue open-mode signal"
    assert set(options) == set(known.split())
    assert options["ntasks-per-node"] == "1" and options["time"] == "08:00:00"


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["1h", "1s"])
def test_the_slurm_job_runs_and_hands_itself_on(tmp_path: Path, limit: str) -> None:
    """With a limit that is over after the first block it is put into the queue again, until it is finished."""
    write_tiny_model(tmp_path / "tiny", num_hidden_layers=2)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400)
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, body in {
        "srun": '"$@"',
        "scontrol": 'case $1 in show) echo 127.0.0.1;; *) echo "$@" >> queue;; esac',
    }.items():
        (bin / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runs = 0
    while not (tmp_path / "out").exists() and runs < 4:
        given = {
            "MODEL": "tiny",
            "OUT": "out",
            "CALIB": "text.txt",
            "PROCESSES": "2",
            "PORT": str(port),
            "LIMIT": limit,
        }
        given |= {"OPTIONS": "--device cpu --recipe duquant++ --samples 4 --seq-len 32", "OMP_NUM_THREADS": "1"}
        given |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "SLURM_JOB_NUM_NODES": "1"}
        given |= {"SLURM_RESTART_COUNT": str(runs), "GLOO_SOCKET_IFNAME": "lo"}
        given["PATH"] = f"{bin}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", str(SLURM)], cwd=tmp_path, env=os.environ | given, capture_output=True, text=True, timeout=300
        )
        runs += 1
    assert json.loads((tmp_path / "out" / "run.json").read_text())["fingerprint"]["ranks"] == [2], done.stderr
    assert done.returncode == 0
    queued = (tmp_path / "queue").read_text().splitlines() if (tmp_path / "queue").exists() else []
    assert queued == ["requeue 7"] * (runs - 1) and runs == (1 if limit == "1h" else 2)
