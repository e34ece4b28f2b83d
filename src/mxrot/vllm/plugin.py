"""vLLM loads mxrot's checkpoints as mxrot computes them, where both are installed.

vLLM calls `register` in each of its processes (entry point `mxrot` of the group `vllm.general_plugins`). A checkpoint
with mxrot's marker is then run by `vllm.linear`, which knows what stock vLLM does not: a matrix a block,
biases, several devices, and mxrot's kernels. `--quantization compressed-tensors` leaves it to stock vLLM all the same.

Nothing of vLLM is imported before it calls, and nothing else of mxrot before it meets such a checkpoint.
"""

from __future__ import annotations

from typing import Any

from mxrot.marker import IN_VLLM, is_ours


def register() -> None:
    """Make the method known to vLLM; may be called more than once."""
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    class MxrotMethod(QuantizationConfig):
        """Stands for the class of a quantization config: says which checkpoints are its own, and makes their config."""

        @classmethod
        def override_quantization_method(
            cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
        ) -> str | None:
            """Ours is what `is_ours` knows, unless the user names another method."""
            return IN_VLLM if is_ours(hf_quant_cfg) and user_quant in (None, IN_VLLM) else None

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            from mxrot.vllm.linear import MxrotQuantization

            return MxrotQuantization.from_config(config)

    register_quantization_config(IN_VLLM)(MxrotMethod)
