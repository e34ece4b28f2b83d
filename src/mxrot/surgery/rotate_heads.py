"""Rotations of attention values, merged into the linears before and behind them (SpinQuant's R2, arXiv 2405.16406,
section 3.1; QuaRot, 2404.00456, section 4). Nothing is computed at run time, and the function stays the same.

Attention sums values over tokens, head by head, and o_proj reads the sums. With v R for the values v of each head it
reads the sums times R, and with W_o R for the columns of that head it returns its former output. With grouped queries
several heads read one value head, so all heads of a decoder block have one matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxrot.models import ChangedSource, Source, value_heads, value_rows
from mxrot.surgery.fold_norms import rounded
from mxrot.surgery.rotate import check_orthogonal, digest_of


class RotatedHeads(ChangedSource):
    """The values of each head rotated by the orthogonal `matrices` [decoder blocks, D, D], with D the width of a head.

    Computed in float64, and rounded once to the stored type of each weight. With `rounds` false the two weights stay in
    float64, for a later change that rounds them (`Rotated`). ConfigError for matrices of another shape, and for those
    that are not orthogonal in float64.
    """

    def __init__(self, inner: Source, matrices: Tensor, rounds: bool = True) -> None:
        self._heads, self._width = value_heads(inner.config)
        self.matrices, self._rounds = matrices.detach().double().contiguous(), rounds
        shape = (inner.config.get_text_config().num_hidden_layers, self._width, self._width)
        check_orthogonal(self.matrices, shape, f"{inner.name}: value heads")
        super().__init__(inner, f"value heads rotated by {digest_of(self.matrices)}")

    def changed_block(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        family = self.family
        if not family.attends(index):
            return tensors
        values, reader = f"{family.values}.weight", f"{family.values_read_by}.weight"
        matrix = self.matrices[index].to(tensors[values].device)
        columns = tensors[reader].double().unflatten(-1, (-1, self._width)) @ matrix
        found = {values: self._rows(tensors[values], matrix), reader: columns.flatten(-2)}
        if self._rounds:
            found = {name: self._rounded(index, name, exact) for name, exact in found.items()}
        bias = f"{family.values}.bias"
        if bias in tensors:
            found[bias] = self._rounded(index, bias, self._rows(tensors[bias], matrix))
        return tensors | found

    def _rows(self, tensor: Tensor, matrix: Tensor) -> Tensor:
        """The rotated rows of the value heads: R^T W for the rows W of a head."""
        exact = tensor.to(torch.float64, copy=True)
        own = value_rows(self.family, len(exact), self._heads, self._width).to(exact.device)
        exact[own] = torch.einsum("hd...,de->he...", exact[own], matrix)
        return exact

    def _rounded(self, index: int, name: str, exact: Tensor) -> Tensor:
        full = f"{self.family.block_prefix(index)}.{name}"
        return rounded(full, exact, self.type_of(full))
