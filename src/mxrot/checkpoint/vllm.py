"""vLLM loads mxrot's checkpoints as mxrot computes them, where both are installed.

vLLM calls `register` in each of its processes (entry point `mxrot` of the group `vllm.general_plugins`). A checkpoint
with mxrot's marker is then run by `checkpoint.vllm_linear`, which knows what stock vLLM does not: a matrix a block,
biases, several devices, and mxrot's kernels. `--quantization compressed-tensors` leaves it to stock vLLM all the same.

Nothing of vLLM is imported before it calls.
"""

from __future__ import annotations

METHOD = "mxrot"
"""The name of the quantization method in vLLM."""


def register() -> None:
    """Make the method known to vLLM; may be called more than once."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from mxrot.checkpoint.vllm_linear import MxrotQuantization

    register_quantization_config(METHOD)(MxrotQuantization)
