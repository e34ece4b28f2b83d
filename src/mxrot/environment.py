"""The device and the versions that a run uses."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

from mxrot.errors import ConfigError
from mxrot.nearest import did_you_mean
from mxrot.version import __version__


def check_device(device: torch.device | str, given: str = "device") -> None:
    """ConfigError, which begins with `given`, unless the device computes a float64 product correctly.

    Transforms, statistics and rounding compute in float64. MPS and some Intel GPUs have no float64, and a meta device
    has no values. Making a float64 tensor does not show this on any of them.
    """
    try:
        kind = torch.device(device)
    except (RuntimeError, UnicodeError) as error:
        near = did_you_mean(str(device), ("cuda",))
        raise _unusable(given, device, f"no device is called so{';' if near else ''}{near}") from error
    if kind.type == "cpu" and kind.index is not None:
        raise _unusable(given, device, "the CPU is one device, and has no number")
    try:
        factor = torch.full((2, 2), 2.0, dtype=torch.float64, device=device)
        answer = float((factor @ factor).sum())
    except TypeError as error:
        raise _unusable(given, device, f"it does not compute in float64 ({_first_line(error)})") from error
    except (RuntimeError, AssertionError, ImportError, ValueError) as error:
        raise _unusable(given, device, _first_line(error)) from error
    if answer != 32.0:
        raise _unusable(given, device, f"2 x 2 matrices of twos multiply to {answer / 4:g} there, not 8")


def available_memory() -> float | None:
    """Bytes of main memory that are available. None if the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return None


def versions(tasks: bool = False) -> dict[str, str]:
    """The versions that can affect a result. With `tasks`, also the version of lm-eval."""
    return ({"lm_eval": version("lm_eval")} if tasks else {}) | {
        "mxrot": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    """The name of the GPU, or the type of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _unusable(given: str, device: torch.device | str, why: str) -> ConfigError:
    shown = str(device)[:100]
    return ConfigError(f"{given} {shown}: not usable here: {why}; take cpu, or cuda where there is a GPU of NVIDIA")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
