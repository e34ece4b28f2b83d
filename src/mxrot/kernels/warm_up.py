"""The numbers of rows at which the path of a linear changes, and compilation of kernels before they are needed.

Triton compiles a kernel when it is first called with new constants. The constants of a linear's kernels depend on its
shape and on the number of input rows. Each kernel is therefore called once, with few rows if possible.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor

from mxrot.kernels.crossovers import MOST_MIDDLE_ROWS, MOST_ROWS
from mxrot.kernels.dispatch import Choice, choose_path, has_triton
from mxrot.kernels.fixed_rows import has_invariant_rows
from mxrot.kernels.linear import PackedWeight

_STEPS = 8
"""Numbers of rows that are checked between one power of two and the next."""
_warm: set[Hashable] = set()
"""Variants that were compiled in this process, by the shapes that kernels are compiled for."""


def path_changes(weight: PackedWeight, device: torch.device) -> list[tuple[int, Choice]]:
    """The path from each number of rows on, the fewest rows first.

    No choice changes beyond `MOST_MIDDLE_ROWS`, which no crossover exceeds.
    """
    found: list[tuple[int, Choice]] = []
    for rows in range(1, MOST_MIDDLE_ROWS + 2):
        choice = choose_path(rows, weight, device)
        if not found or choice.path != found[-1][1].path:
            found.append((rows, choice))
    return found


def path_lines(device: torch.device) -> Iterator[str]:
    """The paths of W4A4 linears with suitable weights on this device: one line per path, with its numbers of rows."""
    changes = path_changes(_nominal(), device)
    ends = [*(f" to {rows - 1}" for rows, _ in changes[1:]), " or more"]
    for (rows, choice), end in zip(changes, ends, strict=True):
        yield f"{rows}{end} rows: {choice.path or 'plain, weights written out for each call'} ({choice.reason})"


def _nominal() -> PackedWeight:
    """A weight that every path accepts."""
    codes, scales = torch.empty(128, 16, device="meta"), torch.empty(128, 1, device="meta")
    exponents = torch.empty(128, device="meta")
    return PackedWeight(codes, scales, exponents, exponents, swizzled=scales)


def row_counts(weight: PackedWeight, matrices: Tensor | None, device: torch.device, most_rows: int) -> list[int]:
    """The smallest set of numbers of rows, up to `most_rows`, that compiles every kernel of a linear."""
    changes = path_changes(weight, device)
    seen: dict[Hashable, int] = {}
    for rows in _candidates(most_rows):
        path = next(choice.path for first, choice in reversed(changes) if rows >= first)
        seen.setdefault(variant(rows, path, weight, matrices, device), rows)
    return sorted(seen.values())


def _candidates(most_rows: int) -> Iterator[int]:
    """All numbers up to MOST_ROWS + 1. Beyond, numbers at which a kernel could split its input differently, and each
    plus one."""
    yield from range(1, min(most_rows, MOST_ROWS + 1) + 1)
    power = MOST_ROWS
    while power < most_rows:
        for step in range(_STEPS):
            rows = power + power // _STEPS * step
            yield from (count for count in (rows, rows + 1) if MOST_ROWS + 1 < count <= most_rows)
        power *= 2
    yield most_rows


def variant(
    rows: int, path: str | None, weight: PackedWeight, matrices: Tensor | None, device: torch.device
) -> Hashable:
    """The key of what the kernels of one call are compiled for, as far as it depends on the rows."""
    from mxrot.kernels.cuda import middle
    from mxrot.kernels.fused.middle import default_tile, processors_of
    from mxrot.kernels.fused.rotate_quantize import compiled_for
    from mxrot.kernels.fused.skinny import tile_for

    height, groups = weight.scales.shape
    is_packed = path == "block scales"
    quantizer = compiled_for(rows, 32 * groups, matrices, is_packed, has_invariant_rows())
    tile: Hashable = tile_for(rows, height, groups, device) if path == "matrix units" else None
    if path in ("middle rows", "fixed tiles") and groups % 4 == 0 and middle.is_there(device):
        tile = middle.choose_tile(rows, height, groups) if path == "middle rows" else middle.whole_tile(rows)
    elif path == "middle rows":
        tile = default_tile(rows, height, groups, processors_of(device))
    return path, quantizer, tile


def warm_up(
    compute: Callable[[Tensor], object],
    weight: PackedWeight | None,
    matrices: Tensor | None,
    like: Tensor,
    most_rows: int,
) -> list[int]:
    """Compile the kernels that `compute` uses for inputs of up to `most_rows` rows. Returns the numbers of rows that it
    was called with.

    Inputs have the width, type and device of `like` [0, K]. `weight` is that of W4A4. None stands for other formats.
    Their changes are not known, so powers of two, and each plus one, are used. Nothing is called if kernels are not
    compiled on the device, or if this process has compiled them before.
    """
    if not compiles(like.device):
        return []
    which = _shapes_of(weight, matrices, like, most_rows)
    if weight is not None and which in _warm:
        return []
    _warm.add(which)
    counts = _powers(most_rows) if weight is None else row_counts(weight, matrices, like.device, most_rows)
    for rows in counts:
        compute(like.new_zeros(rows, like.shape[1]))
    return counts


def _shapes_of(weight: PackedWeight | None, matrices: Tensor | None, like: Tensor, most_rows: int) -> Hashable:
    height = None if weight is None else (len(weight.codes), weight.row_exponents is None, weight.lifted is None)
    groups = None if matrices is None else len(matrices)
    return height, like.shape[1], like.dtype, like.device, groups, most_rows, has_invariant_rows()


def _powers(most_rows: int) -> list[int]:
    """Powers of two up to `most_rows`, and each plus one."""
    powers = [1 << place for place in range(most_rows.bit_length())]
    return sorted({rows for power in powers for rows in (power, power + 1) if rows <= most_rows} | {most_rows})


def compiles(device: torch.device) -> bool:
    """True if kernels are compiled for this device."""
    return device.type == "cuda" and has_triton()
