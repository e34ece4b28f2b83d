"""A new order for the channels inside value heads: v's rows and the columns of o that read them. Free at run time.

Attention sums values over tokens, channel by channel, without rotary embedding. With grouped queries, the heads that
read one value head share its order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxrot.errors import ConfigError
from mxrot.models import ChangedSource, Source, value_heads, value_rows
from mxrot.surgery.rotate import digest_of


class PermutedHeads(ChangedSource):
    """Channel j of a value head is the former channel order[j]. Bits are moved, not changed.

    `orders` are permutations, int64 [decoder blocks, value heads, D], with D the width of a head. They permute the rows
    (and biases) of the values, and the columns of the linear behind attention. ConfigError for orders of another shape,
    and for anything but a permutation.
    """

    def __init__(self, inner: Source, orders: Tensor) -> None:
        self._heads, self._width = value_heads(inner.config)
        self.orders = orders.detach().cpu().long().contiguous()
        shape = (inner.config.get_text_config().num_hidden_layers, self._heads, self._width)
        if self.orders.shape != shape:
            raise ConfigError(
                f"{inner.name}: value heads: orders of shape {list(orders.shape)}; expected {list(shape)}"
            )
        if not torch.equal(self.orders.sort(dim=-1).values, torch.arange(self._width).expand(shape)):
            raise ConfigError(f"{inner.name}: value heads: an order that is no permutation of {self._width}")
        super().__init__(inner, f"value heads permuted by {digest_of(self.orders)}")

    def changed_block(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.family.attends(index):
            return tensors
        values, reader = self.family.values, f"{self.family.values_read_by}.weight"
        order = self.orders[index].to(tensors[reader].device)
        columns = tensors[reader].unflatten(1, (self._heads, -1, self._width))
        into = order[None, :, None].expand_as(columns)
        found = {reader: columns.gather(-1, into).flatten(1)}
        for name in (f"{values}.weight", f"{values}.bias"):
            if name in tensors:  # the bias is optional
                found[name] = self._rows(tensors[name], order)
        return tensors | found

    def _rows(self, tensor: Tensor, order: Tensor) -> Tensor:
        """The rows of the value heads in another order."""
        rows = torch.arange(len(tensor), device=order.device)
        own = value_rows(self.family, len(tensor), self._heads, self._width).to(order.device)
        rows[own] = own.gather(1, order)
        return tensor[rows]
