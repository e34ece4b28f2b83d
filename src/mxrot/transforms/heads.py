"""Transforms of keys and values for a quantized cache: WUSH-KV (arXiv 2609.38121), section 5's solver for each head.

The queries of a group read a head of keys, k q^T = (k T)(q T^-T)^T, just as rows of weights read inputs. With M the
mean of k^T k and H that of q^T q, T is `balancing_transform(M, H)`. It minimizes the product of traces tr(T^T M T)
tr(T^-1 H T^-T) and gives every channel the same share of both. For values, the columns of o_proj that read the head
replace the queries.

The scale of T is free, since one side is divided by what the other is multiplied with. Here |det T| = 1, so that keys
and values keep their size, and FP16 scales stay in range.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxrot.transforms.moments import balancing_transform

DAMPING = 0.01
"""The damping added to the diagonal of both second moments, relative to its mean."""


def head_transforms(kept: Tensor, readers: Tensor) -> Tensor:
    """T of each head, float64 [heads, D, D] with |det T| = 1.

    `kept` and `readers` are the second moments of the cached rows and of their readers, both symmetric float64
    [heads, D, D]. A head with zero moments in either gets the Hadamard matrix.
    ConfigError for a width D without a Hadamard matrix; torch.linalg.LinAlgError for moments that are not finite.
    """
    found = balancing_transform(kept, readers, DAMPING).matrices
    size = found.shape[-1]
    _, logarithm = torch.linalg.slogdet(found)
    return found / (logarithm / size).exp()[:, None, None]
