"""Launching a kernel while the one before it still runs (CUDA's programmatic dependent launch).

A kernel launched so (`launch_pdl=True`) begins when the one before lets it, at the latest when that one is done, and
must wait (`gdc_wait`) before it touches what that one writes or reads. A kernel of a few microseconds is mostly its
launch and its first loads, and those lie beside the end of the other kernel then.

What is not the other kernel's may be touched before the wait: weights are, by the product from packed codes. So a
kernel that lets the next one begin waits itself before it does, and everything that ran before it is done then.
"""

from __future__ import annotations

from functools import cache

import torch


@cache
def can_overlap(device: torch.device) -> bool:
    """Has this device such launches?"""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
