"""Which row counts change how a linear is computed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mxrot.kernels.crossovers import MOST_ROWS
from mxrot.kernels.dispatch import Choice, choose_path
from mxrot.kernels.linear import PackedWeight


def path_changes(weight: PackedWeight, device: torch.device) -> list[tuple[int, Choice]]:
    """From how many rows on which way is taken, the fewest rows first.

    No choice changes beyond `MOST_ROWS`, which no crossover exceeds.
    """
    found: list[tuple[int, Choice]] = []
    for rows in range(1, MOST_ROWS + 2):
        choice = choose_path(rows, weight, device)
        if not found or choice.path != found[-1][1].path:
            found.append((rows, choice))
    return found


def path_lines(device: torch.device) -> Iterator[str]:
    """What computes W4A4 linears there, whose weights fit: a line for each way, with the rows for which it is taken."""
    changes = path_changes(_nominal(), device)
    ends = [*(f" to {rows - 1}" for rows, _ in changes[1:]), " or more"]
    for (rows, choice), end in zip(changes, ends, strict=True):
        yield f"{rows}{end} rows: {choice.path or 'plain, weights written out for each call'} ({choice.reason})"


def _nominal() -> PackedWeight:
    """A weight that every way takes."""
    codes, scales = torch.empty(128, 16, device="meta"), torch.empty(128, 1, device="meta")
    exponents = torch.empty(128, device="meta")
    return PackedWeight(codes, scales, exponents, exponents, swizzled=scales)
