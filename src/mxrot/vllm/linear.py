"""mxrot's quantized linear inside vLLM's parallel linears. Only vLLM imports this module, through `vllm.plugin`.

vLLM holds q, k, v as one linear, and gate, up as another. A site is therefore one linear here, with one scheme. A
linear that is split along its outputs reads whole inputs and keeps the whole transform. A linear that is split along
its inputs keeps the matrices of its own blocks, so its share of the inputs must be whole blocks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.transform.linear import get_layer_partition_names
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.parameter import ChannelQuantScaleParameter, GroupQuantScaleParameter, ModelWeightParameter

from mxrot.checkpoint.checked import check_checkpoint
from mxrot.checkpoint.layout import Layout, read_layout
from mxrot.errors import ConfigError
from mxrot.formats.quantizer import PACKED, PART
from mxrot.layers import QuantLinear
from mxrot.marker import IN_VLLM
from mxrot.models import find_family
from mxrot.scheme import Scheme, SiteScheme, scheme_name
from mxrot.transforms.stages import BlockDiagonalSpec
from mxrot.vllm.head import MxrotHeadMethod
from mxrot.vllm.install import SlicedTransform, install_linear, transform_module
from mxrot.vllm.verdict import CACHE_STOP, OPERANDS_STOP, input_block, why_not_in_plugin


class MxrotQuantization(CompressedTensorsConfig):
    """A checkpoint's `quantization_config` for vLLM. Its base class is only told what is ignored."""

    layout: Layout
    scheme: Scheme
    transform_names: dict[str, str]
    """The names of the transforms of linears' inputs, by the full names of the linears."""
    transforms: dict[str, SlicedTransform]
    """The transforms by these names. Linears of a site that vLLM holds apart share one."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MxrotQuantization:
        """CheckpointError if this mxrot does not know something in the config."""
        layout = read_layout(config, "config.json")
        found: MxrotQuantization = super().from_config({"ignore": config["ignore"], "format": config["format"]})
        found.layout, found.transforms = layout, {}
        return found

    def maybe_update_config(self, model_name: str, hf_config: Any = None, **options: Any) -> None:
        """Check the model, and its files if they are on this machine already. vLLM calls this method.

        CheckpointError if the folder that vLLM is about to read contradicts itself. ConfigError for quantized products
        of attention and a quantized cache.
        """
        super().maybe_update_config(model_name, hf_config=hf_config, **options)
        family = find_family(hf_config, model_name)
        if Path(model_name).is_dir():
            self.scheme = check_checkpoint(Path(model_name)).scheme
        else:
            self.scheme = self.layout.scheme(family, hf_config.get_text_config().num_hidden_layers)
        if self.scheme.attention is not None:
            raise ConfigError(f"{model_name}: {OPERANDS_STOP}")
        if self.scheme.cache is not None:
            raise ConfigError(f"{model_name}: {CACHE_STOP}")
        self.transform_names = {
            f"{family.block_prefix(index)}.{name}": scheme_name(index, site)
            for index in range(hf_config.get_text_config().num_hidden_layers)
            for site in self.scheme.active_sites(family, index)
            for name in site.linears
        }

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    def get_name(self) -> str:
        return IN_VLLM

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if isinstance(layer, RoutedExperts):
            raise ConfigError(f"{prefix}: has experts, which mxrot does not compute in vLLM")
        if isinstance(layer, ParallelLMHead) and self.scheme.head is not None:
            return self._head_method(prefix, self.scheme.head)
        if not isinstance(layer, LinearBase):
            return super().get_quant_method(layer, prefix)
        parts = get_layer_partition_names(prefix, self.packed_modules_mapping)
        own = self.scheme_of(prefix, parts)
        if own is None:
            return UnquantizedLinearMethod()
        if reason := why_not_in_plugin(own):
            raise ConfigError(f"{prefix}: {reason}")
        return MxrotLinearMethod(prefix, own, self.transform_names[parts[0]], self.transforms)

    def _head_method(self, prefix: str, scheme: SiteScheme) -> MxrotHeadMethod:
        if prefix != self.layout.head:
            raise ConfigError(f"{prefix}: the quantized head of this checkpoint is {self.layout.head}")
        if reason := why_not_in_plugin(scheme):
            raise ConfigError(f"{prefix}: {reason}")
        return MxrotHeadMethod(prefix, scheme)

    def scheme_of(self, prefix: str, parts: list[str]) -> SiteScheme | None:
        """The scheme of a linear of vLLM, which all of its parts share. None if it is not quantized.

        ConfigError if the parts differ, or if the checkpoint does not know one of them.
        """
        for part in parts:
            if part not in self.scheme.linears and part not in self.scheme.left:
                raise ConfigError(f"{prefix}: {part} is not a linear of this checkpoint")
        found = {(self.scheme.linears.get(part), self.transform_names.get(part)) for part in parts}
        if len(found) > 1:
            raise ConfigError(f"{prefix}: its parts {', '.join(parts)} are not of one site, or not quantized alike")
        return found.pop()[0]


@register_weight_loader_v2_supported_method
class MxrotLinearMethod(LinearMethodBase):
    """Q(x T) W_q^T + b, as `layers.product` computes it, for one linear of vLLM."""

    def __init__(
        self, prefix: str, scheme: SiteScheme, transform_name: str, transforms: dict[str, SlicedTransform]
    ) -> None:
        self.prefix, self.scheme = prefix, scheme
        self.transform_name, self.transforms = transform_name, transforms

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
        """Create parameters with the names and shapes of the checkpoint, for the part on this device."""
        self.dtype = params_dtype
        self.most_rows = get_current_vllm_config().scheduler_config.max_num_batched_tokens
        rows, columns = sum(output_partition_sizes), input_size_per_partition
        block = input_block(self.scheme, input_size)
        if columns % block:
            raise ConfigError(
                f"{self.prefix}: {input_size} inputs on {input_size // columns} devices are {columns} each, not a "
                f"multiple of {block}; use fewer devices"
            )
        loader = attributes["weight_loader"]
        for name, (shape, dtype) in self.scheme.weights.stored_parts(rows, columns).items():
            empty = torch.empty(shape, dtype=dtype)
            layer.register_parameter(name, self._parameter(name, empty, loader))
        if self.scheme.stages:
            layer.add_module(transform_module(self.transform_name), self._transform(layer, columns, input_size))

    def _parameter(self, name: str, empty: Tensor, loader: Any) -> nn.Parameter:
        """A parameter that vLLM fills with the rows and columns of this device."""
        per = {PART + part.name: part.per for part in self.scheme.weights.format.grid.parts(self.scheme.weights.rule)}
        if per.get(name) == "row":
            return ChannelQuantScaleParameter(data=empty, output_dim=0, weight_loader=loader)
        kind = ModelWeightParameter if name == PACKED else GroupQuantScaleParameter
        return kind(data=empty, input_dim=1, output_dim=0, weight_loader=loader)

    def _transform(self, layer: Any, columns: int, input_size: int) -> SlicedTransform:
        (stage,) = self.scheme.stages
        assert isinstance(stage, BlockDiagonalSpec)
        first = layer.tp_rank * columns // stage.block if columns < input_size else 0
        return self.transforms.setdefault(self.transform_name, SlicedTransform(stage, columns, first))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Replace the parameters by a QuantLinear, and compile its kernels."""
        columns, rows = layer.input_size_per_partition, len(layer.weight_packed)
        linear = QuantLinear(columns, rows, self.scheme.weights, self.scheme.activations, device="meta")
        install_linear(layer, linear, self.scheme, self.transform_name, self.dtype, self.most_rows)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        linear: QuantLinear = layer.quantized
        return linear.compute(x, linear.site_weight(), bias)
