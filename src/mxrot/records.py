"""What a run writes down about itself."""

from __future__ import annotations

import math
import platform
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch
import transformers

from mxrot.kernels.crossovers import find_crossovers
from mxrot.kernels.dispatch import has_triton
from mxrot.recipe import Recipe
from mxrot.tuning import Check
from mxrot.version import __version__


@dataclass(frozen=True)
class LinearReport:
    """What quantizing one linear cost."""

    name: str
    shape: tuple[int, int]
    site: str
    weight_error: float
    """Relative Frobenius error of the transformed weights."""
    output_error: float | None
    """Relative Frobenius error of the output on calibration tokens, inputs quantized too; None without data."""
    damping: float | None
    """Damping of the Hessian that let it factorize; None without one."""
    tokens: int | None = None
    """Calibration tokens that the Hessian is a mean over; None without one. With fewer than the linear has inputs its
    rank is not full."""


@dataclass(frozen=True)
class BlockReport:
    """What quantizing one decoder block cost."""

    index: int
    seconds: float
    linears: list[LinearReport]
    tuning: list[Check] | None = None
    """Losses of its reconstruction; None where it was not tuned by itself."""
    few_tokens: dict[str, int] = field(default_factory=dict)
    """Experts that were calibrated on all tokens of the block, with the number of those that were sent to them."""


@dataclass
class RunRecord:
    """Everything needed to say what a run did, and to do it again."""

    recipe: Recipe
    seed: int
    windows: tuple[int, int] | None
    """Calibration windows and their length; None without data."""
    device: str
    versions: dict[str, str]
    kernels: dict[str, Any] = field(default_factory=dict)
    """As of `kernel_choices`."""
    blocks: list[BlockReport] = field(default_factory=list)
    seconds: float = 0.0
    peak_gpu_bytes: int | None = None
    tuning: list[Check] | None = None
    """Losses of the distillation; None where the whole network was not tuned."""

    def as_table(self) -> dict[str, Any]:
        """The record as JSON takes it."""
        plain = {key: value for key, value in vars(self).items() if key not in ("recipe", "blocks", "tuning")}
        tuning = None if self.tuning is None else [asdict(check) for check in self.tuning]
        blocks = [asdict(block) for block in self.blocks]
        return {"recipe": self.recipe.to_toml(), **plain, "tuning": tuning, "blocks": blocks}


def alike(linears: Iterable[str]) -> dict[str, int]:
    """Full names of linears with stars for numbers, and how many there are of each."""
    return Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in linears)


@dataclass(frozen=True)
class Metric:
    """One measured figure of a quantized model, beside that of the original where it is known."""

    name: str
    """The text or task."""
    measure: str
    value: float
    error: float | None = None
    """Standard error of `value`."""
    original: float | None = None
    difference_error: float | None = None
    """Standard error of `value` less `original`, where both were measured on the same text."""
    counted: str = ""
    """On how much it was measured."""
    is_share: bool = False
    """Shown in percent."""
    digits: int = 3
    """Shown behind the point, where it is no share."""

    @property
    def cells(self) -> tuple[str, str, str, str, str, str]:
        """Name, measure, original, value, difference and what was counted, as tables show them."""
        difference = None if self.original is None else self.value - self.original
        return (
            self.name,
            self.measure + (", %" if self.is_share else ""),
            self._shown(self.original),
            self._shown(self.value, self.error),
            self._shown(difference, self.difference_error, signed=True),
            self.counted,
        )

    def _shown(self, value: float | None, error: float | None = None, signed: bool = False) -> str:
        if value is None:
            return ""
        factor, digits = (100, 2) if self.is_share else (1, self.digits)
        shown = f"{factor * value:{'+' if signed else ''}.{digits}f}"
        return shown if error is None or math.isnan(error) else f"{shown} ± {factor * error:.{digits}f}"


def versions(tasks: bool = False) -> dict[str, str]:
    """Versions of what decides about a number; with `tasks` also that of lm-eval."""
    return ({"lm_eval": version("lm_eval")} if tasks else {}) | {
        "mxrot": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def kernel_choices(device: torch.device | str) -> dict[str, Any]:
    """What chooses there between ways to compute that round differently.

    The number of threads does not (docs/log.md). Crossovers are numbers of rows up to which a way is the fastest.
    """
    device = torch.device(device)
    precision = {"float32_products": torch.get_float32_matmul_precision()}
    if device.type != "cuda":
        return precision | {"instructions": torch.backends.cpu.get_cpu_capability()}
    found = find_crossovers(device)
    crossovers = None if found is None else asdict(found.crossovers) | {"from": found.origin}
    return precision | {"triton": has_triton(), "crossovers": crossovers}


def device_name(device: torch.device) -> str:
    """What computes: the GPU's name, or the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
