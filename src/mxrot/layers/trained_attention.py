"""Attention with quantized keys and values when gradients are needed: one call of PyTorch's own attention.

In the sliced computation, a backward pass would keep all scores. Here keys and values are rounded with the gradient of
unrounded values, and PyTorch multiplies and sums. It does so in its own type (bfloat16 under autocast, which holds
MXFP4 values exactly and rounds INT4 values). The last bits therefore differ from the result without gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mxrot.formats import CacheScheme
from mxrot.kernels import CacheMatrices
from mxrot.layers.attention import for_each_head
from mxrot.layers.installed_cache import turned
from mxrot.layers.quantized_attention import rounded


def is_trained(scheme: CacheScheme, inputs: tuple[object, ...], softcap: float | None) -> bool:
    """True if a gradient is needed that this function supports. It reads all tokens alike, and has no soft caps."""
    if not torch.is_grad_enabled() or scheme.first or scheme.last or softcap is not None:
        return False
    return all(isinstance(x, Tensor) for x in inputs) and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def trained_attention(
    scheme: CacheScheme,
    matrices: CacheMatrices,
    inputs: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """Query [batch, heads, tokens, width], and keys and values with as many heads or fewer, to [batch, tokens, heads,
    width] in the type of the query. `matrices` are for products in float32, or in float64 for inputs in float64. `mask`
    is as for `cached_attention`."""
    query, key, value = inputs
    if mask is None and query.shape[2] > 1:
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]  # later keys are not filled yet
    kept, dtype = key.shape[1], query.dtype
    work = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.autocast(query.device.type, enabled=False):
        key = rounded(turned(key.to(work), matrices.keys), scheme.keys).to(dtype)
        value = rounded(turned(value.to(work), matrices.values), scheme.values).to(dtype)
        if matrices.queries is not None:
            groups = query.to(work).unflatten(1, (kept, -1))
            query = (groups @ matrices.queries[:, None]).flatten(1, 2).to(dtype)
    key, value = (for_each_head(part, query.shape[1] // kept) for part in (key, value))
    mask = None if mask is None else mask[..., : key.shape[2]]
    is_causal = mask is None and query.shape[2] > 1
    found = nn.functional.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, scale=scaling)
    found = found.transpose(1, 2)
    if matrices.outputs is not None:
        with torch.autocast(query.device.type, enabled=False):
            found = (found.to(work).unflatten(2, (kept, -1)) @ matrices.outputs).flatten(2, 3)
    return found.to(dtype).contiguous()
