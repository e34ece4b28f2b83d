"""The event of a finished block, for callbacks that watch a run."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch

from mxrot.calibration import World
from mxrot.errors import ConfigError
from mxrot.quantizing.part import BlockRun
from mxrot.quantizing.record import BlockReport, LinearReport
from mxrot.watching import Watch


def watched(watch: Watch | None, world: World, is_stored: bool) -> Watch:
    """The watch of a run in one of several processes. ConfigError if it could end a run that keeps nothing."""
    watch = Watch() if watch is None else watch.among(world)
    if watch.limit is not None and not is_stored:
        raise ConfigError("a time limit needs an output, from which the run can continue")
    return watch


def tell_of_block(run: BlockRun, report: BlockReport, is_new: bool, tokens: int | None) -> None:
    """Report that a block is finished, and stored if the recipe does so. TimeLimitError if the next one would probably
    end too late. `tokens` counts those of all calibration windows."""
    blocks, watch = run.config.num_hidden_layers, run.watch
    if not is_new:
        watch.skip("block", report.seconds)
        return
    name = run.family.block_prefix(report.index)
    watch.finish("block", report.seconds, **block_event(report, name, blocks, tokens, run.device))
    # A resumed run repeats the preparation for tuning a network, so a stop before it would save nothing.
    if not run.recipe.tunes_network and not run.is_last(report.index):
        watch.end_if_over("block", f"block {report.index + 1} of {blocks}")


def block_event(
    report: BlockReport, name: str, blocks: int, tokens: int | None, device: torch.device
) -> dict[str, Any]:
    """The block's index, its errors by site, memory and tokens, as a JSON table."""
    sites: dict[str, list[LinearReport]] = {}
    for linear in report.linears:
        sites.setdefault(linear.site, []).append(linear)
    return {
        "block": report.index,
        "blocks": blocks,
        "name": name,
        "tokens": tokens,
        "errors": {site: _errors(linears) for site, linears in sites.items()},
        "memory": {"gpu_peak_bytes": _gpu_peak(device), "host_peak_bytes": _host_peak()},
    }


def _errors(linears: list[LinearReport]) -> dict[str, float | None]:
    """The mean errors over the linears of each site, all experts included."""
    return {
        "weight": _mean(linear.weight_error for linear in linears),
        "output": _mean(linear.output_error for linear in linears),
    }


def _mean(errors: Iterable[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return sum(known) / len(known) if known else None


def _gpu_peak(device: torch.device) -> int | None:
    """The peak of allocated bytes since the run began."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _host_peak() -> int | None:
    """The peak of resident bytes since the process began. None if the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
