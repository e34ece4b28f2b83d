"""Launching a kernel while the previous one still runs (CUDA's programmatic dependent launch).

A kernel launched in this way (`launch_pdl=True`) starts when the previous one allows it, at the latest when that one
has finished. It must wait (`gdc_wait`) before it touches anything that the previous one writes or reads. The time of a
kernel of a few microseconds is mostly its launch and its first loads, which then overlap with the end of the previous
kernel.

Anything that the previous kernel does not use may be touched before the wait, such as the weights in the product from
packed codes. A kernel that allows the next one to start must first wait itself. Everything that ran before it has then
finished.
"""

from __future__ import annotations

from functools import cache

import torch


@cache
def can_overlap(device: torch.device) -> bool:
    """True if this device supports such launches."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
