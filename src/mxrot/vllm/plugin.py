"""The vLLM plugin: vLLM runs mxrot's checkpoints with mxrot's own code, if both are installed.

vLLM calls `register` in each of its processes (entry point `mxrot` of the group `vllm.general_plugins`). `vllm.linear`
then runs every checkpoint with mxrot's marker. It supports what stock vLLM does not: a matrix for each block, biases,
several devices, and mxrot's kernels. With `--quantization compressed-tensors`, stock vLLM still runs the checkpoint.

Nothing of vLLM is imported before vLLM calls, and nothing else of mxrot before such a checkpoint is loaded.
"""

from __future__ import annotations

from typing import Any

from mxrot.marker import IN_VLLM, is_ours


def register() -> None:
    """Register the method with vLLM. It may be called more than once."""
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    class MxrotMethod(QuantizationConfig):
        """Stands in for the class of a quantization config. It recognizes its checkpoints, and makes their config."""

        @classmethod
        def override_quantization_method(
            cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
        ) -> str | None:
            """The method of a checkpoint that `is_ours` recognizes, unless the user names another method."""
            return IN_VLLM if is_ours(hf_quant_cfg) and user_quant in (None, IN_VLLM) else None

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            from mxrot.vllm.linear import MxrotQuantization

            return MxrotQuantization.from_config(config)

    register_quantization_config(IN_VLLM)(MxrotMethod)
