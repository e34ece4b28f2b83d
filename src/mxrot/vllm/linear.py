"""mxrot's quantized linear inside vLLM's parallel linears; imported by vLLM only, through `checkpoint.vllm`.

vLLM holds q, k, v and gate, up as one linear each, so a site is one linear here. A linear that is split along its
outputs reads whole inputs and keeps the whole transform; one that is split along its inputs keeps the matrices of its
blocks, for which its share of the inputs must be whole blocks of 32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.transform.linear import (
    get_layer_partition_names,
    get_linear_transform_schemes,
)
from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer
from vllm.model_executor.parameter import GroupQuantScaleParameter, ModelWeightParameter
from vllm.model_executor.utils import set_weight_attrs

from mxrot.checkpoint.checked import check_checkpoint
from mxrot.checkpoint.huggingface import CheckpointConfig
from mxrot.errors import ConfigError
from mxrot.layers import InputTransform, QuantLinear, prepare_site
from mxrot.scheme import SiteScheme
from mxrot.transforms.stages import STORED_DTYPE, BlockDiagonalSpec
from mxrot.vllm.plugin import METHOD


class MxrotQuantization(CompressedTensorsConfig):
    """A checkpoint's `quantization_config` for vLLM. Names, and what is ignored, are read as vLLM reads them."""

    checkpoint: CheckpointConfig
    transforms: dict[str, SlicedTransform]
    """By the name of the scheme: linears of a site that vLLM holds apart share one."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MxrotQuantization:
        found: MxrotQuantization = super().from_config(config)
        found.checkpoint = CheckpointConfig.from_dict(config)
        found.transforms = {}
        return found

    def maybe_update_config(self, model_name: str, *arguments: Any, **options: Any) -> None:
        """CheckpointError if the folder that vLLM is about to read contradicts itself; vLLM calls it."""
        super().maybe_update_config(model_name, *arguments, **options)
        if Path(model_name).is_dir():
            check_checkpoint(Path(model_name))

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    def get_name(self) -> str:
        return METHOD

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if isinstance(layer, RoutedExperts):
            raise ConfigError(f"{prefix}: has experts, which mxrot does not compute in vLLM")
        if not isinstance(layer, LinearBase):
            return super().get_quant_method(layer, prefix)
        if should_ignore_layer(prefix, self.ignore, self.packed_modules_mapping):
            return UnquantizedLinearMethod()
        return MxrotLinearMethod(self, prefix, self._scheme(layer, prefix))

    def scheme_of(self, prefix: str) -> SiteScheme:
        """What is installed at a linear; ConfigError if its parts have different schemes."""
        parts = get_layer_partition_names(prefix, self.packed_modules_mapping)
        found = {self.checkpoint.layout.scheme_of(part) for part in parts}
        scheme = found.pop()
        if found or scheme is None:
            raise ConfigError(f"{prefix}: its parts {', '.join(parts)} are not quantized alike")
        return scheme

    def _scheme(self, layer: nn.Module, prefix: str) -> str | None:
        """The name of the transform of this linear's inputs; ConfigError if its parts have different ones."""
        found, _ = get_linear_transform_schemes(layer, prefix, self.transform_config, self.packed_modules_mapping)
        names = {transform.scheme_name for transform in found.values()}
        parts = get_layer_partition_names(prefix, self.packed_modules_mapping)
        if names and (len(names) > 1 or len(found) < len(parts)):
            raise ConfigError(f"{prefix}: its parts {', '.join(parts)} do not share one transform")
        return names.pop() if names else None


class SlicedTransform(nn.Module):
    """sqrt(B) T of the blocks that a linear reads here, of all blocks in the checkpoint."""

    def __init__(self, spec: BlockDiagonalSpec, columns: int, first: int) -> None:
        super().__init__()
        self.spec, self.first = spec, first
        one = (spec.block, spec.block)
        shape = (columns // spec.block, *one) if spec.sharing == "block" else one
        self.weight = nn.Parameter(torch.empty(shape, dtype=STORED_DTYPE), requires_grad=False)
        set_weight_attrs(self.weight, {"weight_loader": self.load})

    def load(self, parameter: nn.Parameter, stored: Tensor, *shard: Any) -> None:
        """Take the matrices of these blocks; one matrix stands for all."""
        if stored.dim() == 3:
            stored = stored[self.first : self.first + len(parameter)]
        parameter.data.copy_(stored)


@register_weight_loader_v2_supported_method
class MxrotLinearMethod(LinearMethodBase):
    """Q(x T) W_q^T + b, as `layers.product` computes it."""

    def __init__(self, config: MxrotQuantization, prefix: str, scheme: str | None) -> None:
        self.config, self.prefix, self.scheme = config, prefix, scheme
        self.site = config.scheme_of(prefix)

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Parameters with the names and shapes of the checkpoint, for the part that is kept here."""
        rows, columns = sum(output_partition_sizes), input_size_per_partition
        block = self.site.input_block
        if columns % block:
            raise ConfigError(
                f"{self.prefix}: {input_size} inputs on {input_size // columns} devices are {columns} each, not a "
                f"multiple of {block}; use fewer devices"
            )
        loader = attributes["weight_loader"]
        codes = torch.empty(rows, columns // 2, dtype=torch.uint8)
        scales = torch.empty(rows, columns // self.site.weights.format.block_in(columns), dtype=torch.uint8)
        places = {"input_dim": 1, "output_dim": 0, "weight_loader": loader}
        layer.register_parameter("weight_packed", ModelWeightParameter(data=codes, **places))
        layer.register_parameter("weight_scale", GroupQuantScaleParameter(data=scales, **places))
        if self.scheme is not None:
            layer.add_module(f"{self.scheme}_input", self._transform(layer, columns, input_size))

    def _transform(self, layer: Any, columns: int, input_size: int) -> SlicedTransform:
        assert self.scheme is not None
        (spec,) = self.site.stages
        assert isinstance(spec, BlockDiagonalSpec)
        first = layer.tp_rank * (columns // spec.block) if columns < input_size else 0
        return self.config.transforms.setdefault(self.scheme, SlicedTransform(spec, columns, first))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put a QuantLinear into the place of the parameters."""
        codes, scales = layer.weight_packed.data, layer.weight_scale.data
        site = self.site
        linear = QuantLinear(2 * codes.shape[1], len(codes), site.weights, site.activations, device="meta")
        linear.weight_packed = nn.Parameter(codes, requires_grad=False)
        linear.weight_scale = nn.Parameter(scales, requires_grad=False)
        linear.fast = site.accumulation == "fast"
        if self.scheme is not None:
            stored: SlicedTransform = getattr(layer, f"{self.scheme}_input")
            linear.own_transform(self.scheme, InputTransform((stored.spec,), {"weight": stored.weight.data}))
            delattr(layer, f"{self.scheme}_input")
        prepare_site((linear,))
        layer.add_module("quantized", linear)
        del layer.weight_packed, layer.weight_scale

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        linear: QuantLinear = layer.quantized
        return linear.compute(x, linear.site_weight(), bias)
