"""W4A16 products of other libraries that read the same MXFP4 weights: Marlin, as shipped with vLLM, and Humming.

They are measured where they are installed, beside ours in the same run. Missing ones are named. Both are called as vLLM
calls them. Inputs stay bfloat16 and are not rotated.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mxrot.kernels.plain import PackedRows

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Other:
    """A product of another library."""

    name: str
    package: str
    prepare: Callable[[PackedRows, Sequence[int]], Product]
    """Returns the product with one weight, for bfloat16 inputs [M, K] with these M."""

    def absent(self, device: torch.device) -> str | None:
        """The reason why it cannot be measured on this device. None if it can."""
        if importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return None if device.type == "cuda" else f"it needs a GPU, and this is {device.type}"


def _marlin(weight: PackedRows, rows: Sequence[int]) -> Product:
    from vllm.model_executor.layers.quantization.utils import marlin_utils_fp4

    layer: Any = nn.Module()
    height, width = len(weight.codes), 2 * weight.codes.shape[1]
    layer.output_size_per_partition, layer.input_size_per_partition = height, width
    layer.params_dtype = torch.bfloat16
    layer.weight = nn.Parameter(weight.codes.clone(), requires_grad=False)
    layer.weight_scale = nn.Parameter(weight.scales.clone(), requires_grad=False)
    marlin_utils_fp4.prepare_fp4_layer_for_marlin(layer)
    workspace = getattr(layer, "workspace", None)  # later versions share one between layers

    def product(x: Tensor) -> Tensor:
        found: Tensor = marlin_utils_fp4.apply_fp4_marlin_linear(
            x, layer.weight, layer.weight_scale, None, workspace, height, width
        )
        return found

    return product


_HUMMING_WEIGHTS = {
    "quant_method": "humming",
    "dtype": "float4e2m1",
    "scale_dtype": "float8e8m0",
    "group_size": 32,
    "weight_scale_type": "group",
}
_HUMMING_COMPUTES = json.dumps({"use_batch_invariant": False, "use_f16_accum": False, "gemm_type": "dense"})


def _humming(weight: PackedRows, rows: Sequence[int]) -> Product:
    from humming.layer import HummingLayer, HummingLayerMethod

    with torch.device(weight.codes.device):
        layer = HummingLayer(
            shape_n=len(weight.codes),
            shape_k=2 * weight.codes.shape[1],
            weight_config=_HUMMING_WEIGHTS,
            torch_dtype=torch.bfloat16,
            pad_n_to_multiple=256,
            pad_k_to_multiple=128,
            input_config={"quant_method": "humming", "dtype": "bfloat16"},
        )
        scales = weight.scales.clone().view(torch.float8_e8m0fnu)
        layer.load_from_tensors({"weight": weight.codes.clone().view(torch.int32), "weight_scale": scales})
        layer.transform()
    # Compiling a kernel takes some seconds, so only those for the measured rows are compiled.
    tunings = HummingLayerMethod.get_default_tuning_configs(layer)
    chosen = [one for one in tunings if any(one[0] <= count <= one[1] for count in rows)]
    found: Product = partial(layer, compute_config=_HUMMING_COMPUTES, tuning_config=json.dumps(chosen))
    return found


OTHERS = (Other("W4A16, Marlin", "vllm", _marlin), Other("W4A16, Humming", "humming", _humming))


def prepared_others(
    weights: Sequence[PackedRows], rows: Sequence[int], told: Callable[[str], None]
) -> dict[str, list[Product]]:
    """The products with each weight, by name, that can be prepared. `told` receives the reasons for the others."""
    found = {}
    for other in OTHERS:
        if other.absent(weights[0].codes.device) is None:
            try:
                found[other.name] = [other.prepare(weight, rows) for weight in weights]
            except Exception as error:
                told(f"{other.name}: not measured: {_first_line(error)}")
    return found


def absent_others(device: torch.device) -> dict[str, str]:
    """The products that are not measured on this device, with the reasons."""
    reasons = {other.name: other.absent(device) for other in OTHERS}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
