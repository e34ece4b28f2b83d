"""Run a function in two processes of one world: over gloo, or over NCCL on a GPU each."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, multiprocessing

from mxrot.calibration.world import ProcessWorld

Work = Callable[[ProcessWorld], dict[str, Tensor]]


def of_two_processes(work: Work, folder: Path, device: str = "cpu") -> list[dict[str, Tensor]]:
    """What `work`, a function of a module, gives in each of two processes, by rank."""
    multiprocessing.start_processes(_run, (work, folder, device), nprocs=2, start_method="spawn")
    return [load_file(folder / f"{rank}.safetensors") for rank in (0, 1)]


def _run(rank: int, work: Work, folder: Path, kind: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    place = f"file://{folder / 'meeting'}"
    device = torch.device(kind, rank if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if kind == "cuda" else "gloo"
    distributed.init_process_group(backend, place, timedelta(seconds=60), world_size=2, rank=rank)
    try:
        with torch.no_grad():
            found = work(ProcessWorld(device))
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / f"{rank}.safetensors")
    finally:
        distributed.destroy_process_group()
