"""vLLM's Python code on a CPU, without anything of it that is compiled.

What its wheel computes with compiled code is replaced here, by the plainest that means the same: the MXFP4 product
(vLLM has none for a CPU), and attention over one sequence. Everything else is vLLM's own: config, loader, linears,
transforms, norms, rotary embedding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import vllm.model_executor.layers.quantization.compressed_tensors.transform.module as transform_module
from torch import Tensor, nn
from vllm.config import CompilationConfig, DeviceConfig, LoadConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.forward_context import set_forward_context
from vllm.model_executor.kernels.linear import MxFp4LinearKernel, register_linear_kernel
from vllm.model_executor.layers.utils import default_unquantized_gemm
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.models import llama, qwen2, qwen3
from vllm.platforms.interface import PlatformEnum

from mxrot.formats import fake_quantize, get_format

_ELEMENTS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """float32 [N, K] of packed codes [N, K/2], the even column in the low half, and E8M0 bytes [N, K/32]."""
    both = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    blocks = _ELEMENTS[both.long()].unflatten(-1, (-1, 32))
    return (blocks * torch.exp2(scales.float() - 127)[..., None]).flatten(-2)


class PlainKernel(MxFp4LinearKernel):
    """The product that vLLM's kernels stand for, sums in float32."""

    quantizes_inputs = True
    """W4A4 with scale rule `even`, as vLLM's emulation; otherwise W4A16, as its Marlin kernel."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing to repack."""

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        inputs = x.float()
        if self.quantizes_inputs:
            mxfp4 = get_format("mxfp4")
            inputs = fake_quantize(inputs, mxfp4, mxfp4.rule("even"))
        product = inputs @ dequantize(layer.weight, layer.weight_scale).T
        return (product if bias is None else product + bias.float()).to(x.dtype)


class PlainAttention(nn.Module):
    """Causal attention over one whole sequence, no cache."""

    def __init__(self, heads: int, width: int, scale: float, num_kv_heads: int | None = None, **_: Any) -> None:
        super().__init__()
        self.width, self.scale = width, scale

    def forward(self, *queries_keys_values: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (-1, self.width)).transpose(0, 1)[None] for x in queries_keys_values)
        attend = nn.functional.scaled_dot_product_attention
        return attend(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)[0].transpose(0, 1).flatten(1)


def set_up(rendezvous: Path) -> None:
    """Once a process, before anything is loaded. `rendezvous` is a file that torch.distributed may write."""
    register_linear_kernel(PlainKernel, PlatformEnum.CPU, "mxfp4")
    llama.Attention = qwen2.Attention = qwen3.Attention = PlainAttention
    # What vLLM runs on a GPU; its own for a CPU wants compiled code.
    transform_module.dispatch_unquantized_gemm = lambda: default_unquantized_gemm
    torch.accelerator.empty_cache = lambda: None
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"))):
        init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
        initialize_model_parallel(1)


def configure(folder: Path, dtype: str, quantization: str | None = None, length: int = 64) -> VllmConfig:
    """vLLM's config for a checkpoint, native operations only."""
    model = ModelConfig(
        model=str(folder),
        dtype=dtype,
        quantization=quantization,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=length,
    )
    native = CompilationConfig(custom_ops=["none"])
    return VllmConfig(model_config=model, device_config=DeviceConfig("cpu"), compilation_config=native)


def load(config: VllmConfig) -> Any:
    """The model, filled by vLLM's own loader."""
    # vLLM divides each transform once and remembers its address; a second model may get the same one.
    transform_module.HadamardTransform.scaled_data_ptrs.clear()
    with set_current_vllm_config(config):
        return get_model_loader(LoadConfig()).load_model(vllm_config=config, model_config=config.model_config)


@torch.inference_mode()  # as vLLM on a GPU
def logits(model: Any, config: VllmConfig, tokens: Tensor) -> Tensor:
    """[windows, length, vocabulary] in float32, from the head as vLLM computes it."""
    rows = []
    with set_current_vllm_config(config), set_forward_context(None, config):
        for window in tokens:
            hidden = model(window, torch.arange(len(window)))
            rows.append(model.compute_logits(hidden).float())
    return torch.stack(rows)
