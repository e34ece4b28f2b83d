"""mxrot's quantized head inside vLLM's parallel head. Only vLLM imports this module, through `vllm.linear`.

vLLM splits the head along the vocabulary, which it fills up to a multiple of 64 tokens. Rows without a token have zero
codes, so their logits are zero until vLLM cuts them off.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from mxrot.errors import ConfigError
from mxrot.layers import HeadLinear
from mxrot.scheme import HEAD_TRANSFORM, SiteScheme
from mxrot.transforms.stages import BlockDiagonalSpec
from mxrot.vllm.install import SlicedTransform, install_linear, transform_module


class MxrotHeadMethod(QuantizeMethodBase):
    """Logits of hidden states, as `layers.HeadLinear` computes them, for the rows of one device."""

    def __init__(self, prefix: str, scheme: SiteScheme) -> None:
        self.prefix, self.scheme = prefix, scheme

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
        """Create parameters with the names of the checkpoint, for the rows on this device and those without a token."""
        self.dtype, self.most_rows = params_dtype, most_rows(get_current_vllm_config())
        rows = sum(output_partition_sizes)
        placed = {"input_dim": 1, "output_dim": 0, "weight_loader": attributes["weight_loader"]}
        for name, (shape, dtype) in self.scheme.weights.stored_parts(rows, input_size).items():
            parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
            set_weight_attrs(parameter, placed)
            layer.register_parameter(name, parameter)
        for stage in self.scheme.stages:
            assert isinstance(stage, BlockDiagonalSpec)
            layer.add_module(transform_module(HEAD_TRANSFORM), SlicedTransform(stage, input_size, 0))

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> NoReturn:
        """ConfigError: the head has codes of its own."""
        raise ConfigError(
            f"{self.prefix}: config.json says tie_word_embeddings, and the quantized head is no copy of the embedding"
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Replace the parameters by a HeadLinear, and compile its kernels."""
        rows, columns = len(layer.weight_packed), layer.embedding_dim
        linear = HeadLinear(columns, rows, self.scheme.weights, self.scheme.activations, device="meta")
        install_linear(layer, linear, self.scheme, HEAD_TRANSFORM, self.dtype, self.most_rows)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Hidden states [..., K] to logits [..., rows of this device], in the dtype of `x`."""
        linear: HeadLinear = layer.quantized
        return linear.compute(x, linear.site_weight(), bias)


def most_rows(config: VllmConfig) -> int:
    """The most hidden states that get logits in a step: of each request the last one, and those that are guessed
    ahead."""
    scheduler = config.scheduler_config
    asked = scheduler.max_num_seqs * (1 + config.num_speculative_tokens)
    return int(min(asked, scheduler.max_num_batched_tokens))
