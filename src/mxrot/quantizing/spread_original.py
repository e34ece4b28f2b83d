"""The original model on several devices while it writes text (calibration/spreading.py).

Blocks that no GPU keeps lie in page-locked main memory, so that copies are fast, or in nameless memory-mapped files.
accelerate's hooks copy each weight to its device for the computation, and free the copy afterwards.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxrot.calibration.generation import SPREAD_AT_ONCE
from mxrot.calibration.placement import mapped
from mxrot.calibration.spreading import Spread, check_spreads, room_here, spread_over
from mxrot.calibration.writing_sizes import WritingSizes
from mxrot.errors import MxrotWarning
from mxrot.models import Source, build_skeleton
from mxrot.quantizing.loading import load_original, load_original_block, load_outer

PORTABLE = 1
"""Memory from which copies to all GPUs are fast (cudaHostRegisterPortable)."""


def spread_here(sizes: WritingSizes, device: torch.device) -> Spread | None:
    """How the model is spread over this machine, which is also reported in a line. None if `device` holds it."""
    room = room_here(device, sizes.on_one_device)
    spread = None if room is None else spread_over(sizes, room)
    if spread is not None:
        warnings.warn(f"{spread.said}; it will take a while", MxrotWarning, stacklevel=1)
    return spread


@contextmanager
def opened_original(
    source: Source, dtype: torch.dtype, device: torch.device, spread: Spread | None
) -> Iterator[PreTrainedModel]:
    """The whole model for writing text: on `device`, or spread over devices as long as this is open."""
    if spread is None:
        yield load_original(source, dtype, device)
        return
    check_spreads()
    with ExitStack() as kept:
        model = build_skeleton(source.config)
        for problem in source.problems(model):
            raise problem
        kept.callback(_let_go, model)
        main = torch.device(spread.devices[0])
        load_outer(model, source.family, source.outer(), dtype, main)
        waiting: dict[str, Tensor] = {}
        for index, block in enumerate(model.get_submodule(source.family.blocks).children()):
            waiting |= _load_block(block, index, source, dtype, spread, kept)
        _hook(model, source, spread, waiting)
        setattr(model, SPREAD_AT_ONCE, spread.at_once)
        yield model


def _load_block(
    block: nn.Module, index: int, source: Source, dtype: torch.dtype, spread: Spread, kept: ExitStack
) -> dict[str, Tensor]:
    """Load a block to its place. Returns its tensors by full name if that place is not a device."""
    place = spread.lies[index]
    load_original_block(block, index, source, dtype, spread.device_of(index) if place == "device" else "cpu")
    if place == "device":
        return {}
    tensors = block.state_dict()
    if place == "disk":
        folder = Path(tempfile.gettempdir())
        tensors = {name: mapped(value, folder, "the model that writes text") for name, value in tensors.items()}
    elif torch.cuda.is_available():
        tensors = kept.enter_context(_in_locked_memory(tensors))
    block.to("meta")
    return {f"{source.family.block_prefix(index)}.{name}": value for name, value in tensors.items()}


def _hook(model: PreTrainedModel, source: Source, spread: Spread, waiting: Mapping[str, Tensor]) -> None:
    """Let each block compute on its device, copying the weights that lie elsewhere."""
    from accelerate.hooks import attach_align_device_hook_on_blocks

    family, main = source.family, torch.device(spread.devices[0])
    computes = dict.fromkeys(("", family.embedding, family.final_norm, family.head), main)
    comes = dict.fromkeys((family.embedding, family.final_norm, family.head), False)
    for index, place in enumerate(spread.lies):
        name = family.block_prefix(index)
        computes[name], comes[name] = torch.device(spread.device_of(index)), place != "device"
    attach_align_device_hook_on_blocks(
        model, execution_device=computes, offload=comes, weights_map=waiting, skip_keys="past_key_values"
    )


def _let_go(model: PreTrainedModel) -> None:
    """Remove the hooks, and free all their memory: other processes may be waiting for it."""
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(model, recurse=True)
    model.__dict__.pop(SPREAD_AT_ONCE, None)
    nn.Module.to(model, "meta")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _in_locked_memory(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Copies in one piece of main memory, page-locked while this is open, if the driver agrees.

    PyTorch's own pinned memory is rounded up to a power of two, and is never freed.
    """
    sizes = {name: -(-value.nbytes // 64) * 64 for name, value in tensors.items()}
    piece = torch.empty(sum(sizes.values()), dtype=torch.uint8)
    found, begin = {}, 0
    for name, value in tensors.items():
        part = piece[begin : begin + value.nbytes].view(value.dtype).view(value.shape)
        found[name] = part.copy_(value)
        begin += sizes[name]
    driver = torch.cuda.cudart()
    is_locked = piece.nbytes > 0 and int(driver.cudaHostRegister(piece.data_ptr(), piece.nbytes, PORTABLE)) == 0
    if not is_locked:  # copies are slower
        _clear_error()
    try:
        yield found
    finally:
        if is_locked:
            torch.cuda.synchronize()
            driver.cudaHostUnregister(piece.data_ptr())


def _clear_error() -> None:
    """Clear the driver's last error, which the next operation on a GPU would raise."""
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda")
