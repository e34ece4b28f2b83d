"""Transforms of keys and values for a quantized cache: WUSH-KV (arXiv 2609.38121), section 5's solver a head.

A head of keys is read by the queries of its group, k q^T = (k T)(q T^-T)^T, as inputs are by rows of weights. With M
the mean of k^T k and H that of q^T q it is `balancing_transform(M, H)`, which leaves the least product of traces
tr(T^T M T) tr(T^-1 H T^-T) and gives every channel the same share of both. Of values the columns of o_proj that read
the head stand in the place of queries.

Its scale is free, since one side is divided by what the other is multiplied with: |det T| = 1 here, so that keys and
values keep their size, and scales in FP16 their range.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxrot.transforms.moments import balancing_transform

DAMPING = 0.01
"""Added to the diagonal of both second moments, relative to its mean."""


def head_transforms(kept: Tensor, readers: Tensor) -> Tensor:
    """T of each head, float64 [heads, D, D] with |det T| = 1, of the second moments of what is kept of it and of what
    reads it, both symmetric float64 [heads, D, D]. A head that is dead in either gets the Hadamard matrix.

    ConfigError for a width D without a Hadamard matrix; torch.linalg.LinAlgError for moments that are no numbers.
    """
    found = balancing_transform(kept, readers, DAMPING).matrices
    size = found.shape[-1]
    _, logarithm = torch.linalg.slogdet(found)
    return found / (logarithm / size).exp()[:, None, None]
