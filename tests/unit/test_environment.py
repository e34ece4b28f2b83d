"""Devices that are not here, or cannot compute what is needed."""

from __future__ import annotations

import pytest
import torch

from mxrot.environment import check_device
from mxrot.errors import ConfigError


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_a_cpu_will_do(device: torch.device | str) -> None:
    check_device(device)


@pytest.mark.parametrize(
    "device", ["meta", "mps", "xpu", "hpu", "xla", "vulkan", "privateuseone", "cuda:77", "CPU", "", "gpu", "cpu:x", "0"]
)
def test_what_is_not_here_is_one_line(device: str) -> None:
    with pytest.raises(ConfigError, match=f"^--device {device}: not usable here: ") as caught:
        check_device(device, "--device")
    assert "\n" not in str(caught.value)


def test_a_device_that_multiplies_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "sum", lambda self: torch.tensor(float("nan")))
    with pytest.raises(ConfigError, match="multiply to nan there, not 8"):
        check_device("cpu")
