"""Without a GPU, Triton kernels run in Triton's interpreter; it must be chosen before anything imports Triton."""

import importlib.util
import os

import torch

if importlib.util.find_spec("vllm") is None:
    collect_ignore = ["vllm"]  # `make test-vllm` runs them where vLLM's Python code is

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
