"""Tensors that quantizers are compared on: ordinary ones, and each kind that is easy to get wrong."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from mxrot.formats import Element

FLOAT32_MAX = torch.finfo(torch.float32).max


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(20260607)


def _normal(element: Element, block: int) -> Tensor:
    return torch.randn(33, 4 * block, generator=_generator())


def _student_t(element: Element, block: int) -> Tensor:
    """Two degrees of freedom: infinite variance."""
    generator = _generator()
    chi_squared = torch.empty(33, 4 * block).exponential_(generator=generator)
    return torch.randn(33, 4 * block, generator=generator) / chi_squared.sqrt()


def _log_normal(element: Element, block: int) -> Tensor:
    generator = _generator()
    signs = torch.randn(33, 4 * block, generator=generator).sign()
    return signs * torch.randn(33, 4 * block, generator=generator).mul(4).exp()


def _ties(element: Element, block: int) -> Tensor:
    """Every midpoint between neighbouring magnitudes, times powers of two; each block holds the maximum."""
    magnitudes = sorted({abs(v) for v in element.values if math.isfinite(v) and abs(v) <= element.max})
    midpoints = [(low + high) / 2 for low, high in pairwise(magnitudes)]
    signed = midpoints + [-m for m in midpoints]
    rows = []
    for start in range(0, len(signed), block - 1):
        row = [element.max, *signed[start : start + block - 1]]
        rows.append(row + [0.0] * (block - len(row)))
    exponents = torch.tensor([-100, -30, -1, 0, 1, 7, 30, 100], dtype=torch.float64)
    return (torch.tensor(rows, dtype=torch.float64) * exponents.exp2()[:, None, None]).flatten(1).float()


def _zeros(element: Element, block: int) -> Tensor:
    """Zero blocks next to others."""
    x = _normal(element, block)
    x[::2] = 0.0
    return x


def _negative_zeros(element: Element, block: int) -> Tensor:
    """Half of the elements -0.0, and blocks of nothing else."""
    x = _normal(element, block)
    x[:, ::2] = -0.0
    x[5] = -0.0
    return x


def _subnormal(element: Element, block: int) -> Tensor:
    """Subnormal float32 numbers, with fewer and fewer bits from row to row."""
    generator = _generator()
    bits = torch.randint(0, 1 << 23, (23, 4 * block), generator=generator, dtype=torch.int32)
    signs = torch.randint(0, 2, (23, 4 * block), generator=generator).mul(2).sub(1)
    return (bits >> torch.arange(23, dtype=torch.int32)[:, None]).view(torch.float32) * signs


def _every_exponent(element: Element, block: int) -> Tensor:
    """A row for each float32 exponent; the last rows reach the largest finite number."""
    x = torch.rand(277, block, generator=_generator(), dtype=torch.float64) * 4 - 2
    exponents = torch.arange(-149, 128, dtype=torch.float64)
    return (x * exponents.exp2()[:, None]).clamp(-FLOAT32_MAX, FLOAT32_MAX).float()


def _near_largest(element: Element, block: int) -> Tensor:
    generator = _generator()
    x = (torch.rand(33, 4 * block, generator=generator) - 0.5) * FLOAT32_MAX
    x[:, ::block] = FLOAT32_MAX * (0.4 + 0.6 * torch.rand(33, 4, generator=generator))
    x[0, 0] = FLOAT32_MAX
    return x


def _one_outlier(element: Element, block: int) -> Tensor:
    x = _normal(element, block) * 1e-3
    x[:, 7::block] = -1e4
    return x


def _one_row(element: Element, block: int) -> Tensor:
    return _normal(element, block)[:1]


def _three_dimensions(element: Element, block: int) -> Tensor:
    return _normal(element, block).reshape(3, 11, 4 * block)


def _no_rows(element: Element, block: int) -> Tensor:
    return torch.empty(0, 2 * block)


_MAKERS = {
    "normal": _normal,
    "student_t": _student_t,
    "log_normal": _log_normal,
    "ties": _ties,
    "zeros": _zeros,
    "negative_zeros": _negative_zeros,
    "subnormal": _subnormal,
    "every_exponent": _every_exponent,
    "near_largest": _near_largest,
    "one_outlier": _one_outlier,
    "one_row": _one_row,
    "three_dimensions": _three_dimensions,
    "no_rows": _no_rows,
}
SAMPLES = tuple(_MAKERS)


def sample(name: str, element: Element, block: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The sample called `name` in `dtype`, all finite; K is a multiple of `block`."""
    limit = min(torch.finfo(dtype).max, FLOAT32_MAX)
    return _MAKERS[name](element, block).clamp(-limit, limit).to(dtype)


def bits(x: Tensor) -> Tensor:
    """The bit patterns of a floating-point tensor, so that -0.0 differs from 0.0 and NaN equals itself."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(integers[x.element_size()])
