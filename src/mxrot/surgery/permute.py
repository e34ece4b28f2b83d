"""A new order for the inner channels of an MLP: outliers side by side in a block, or apart, at no cost at run time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from mxrot.errors import ConfigError
from mxrot.models import ChangedSource, Family, Source


class PermutedFfn(ChangedSource):
    """Channel j of the input of an MLP's last linear is the former channel order[j]. Bits are moved, not changed.

    `orders` are permutations, int64 [I], by the full names of these linears (`model.layers.0.mlp.down_proj`, or one of
    an expert). The others stay as they are. The linears' columns are permuted, and the rows (and biases) of gate and
    up, or both halves if these are one linear.
    ConfigError for a linear whose channels do not come from such rows, and for anything but a permutation of its width.
    """

    def __init__(self, inner: Source, orders: Mapping[str, Tensor]) -> None:
        self._rows = {name: _rows_before(inner, name) for name in orders}
        self.orders = {name: order.detach().cpu().long() for name, order in orders.items()}
        digest = hashlib.sha256()
        for name, order in sorted(self.orders.items()):
            if not torch.equal(order.sort().values, torch.arange(len(order))):
                raise ConfigError(f"{name}: the order of its channels is no permutation of {len(order)}")
            digest.update(name.encode() + order.numpy().tobytes())
        super().__init__(inner, f"MLP permuted by {digest.hexdigest()[:16]}")

    def changed_block(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        dotted = f"{self.family.block_prefix(index)}."
        found = dict(tensors)
        for full, order in self.orders.items():
            if not full.startswith(dotted):
                continue
            weight = f"{full.removeprefix(dotted)}.weight"
            if tensors[weight].shape[1] != len(order):
                raise ConfigError(f"{full}: an order of {len(order)} channels; expected {tensors[weight].shape[1]}")
            order = order.to(tensors[weight].device)
            found[weight] = tensors[weight][:, order]
            for name in (f"{linear}.{kind}" for linear in self._rows[full] for kind in ("weight", "bias")):
                if name in tensors:  # the bias is optional
                    found[name] = torch.cat([rows[order] for rows in tensors[name].split(len(order))])
        return found


def _rows_before(source: Source, full: str) -> tuple[str, ...]:
    """The linears of a block whose rows are the channels of the linear `full`, by their names in the block."""
    family = source.family
    blocks, _, rest = full.removeprefix(f"{family.blocks}.").partition(".")
    count = source.config.get_text_config().num_hidden_layers
    is_there = full.startswith(f"{family.blocks}.") and blocks in map(str, range(count))
    found = _feeding(family, int(blocks), rest) if is_there else ()
    if not found:
        known = [name for index in range(count) for name in permutable_linears(family, index)]
        raise ConfigError(
            f"{source.name}: {full}: no linear of family {family.name} whose channels can be permuted"
            + (f"; those are {family.blocks}.*.{known[0]}" if known else "")
        )
    return found


def permutable_linears(family: Family, index: int) -> list[str]:
    """The linears of block `index` whose channels can be permuted, by their names in it."""
    return [linear for site in family.sites_of(index) for linear in site.linears if _feeding(family, index, linear)]


def _feeding(family: Family, index: int, linear: str) -> tuple[str, ...]:
    """The linears whose rows make the channels of `linear`: one row per channel, or one in each half of a linear. Empty
    if a row feeds several channels."""
    sites = family.sites_of(index)
    for site in sites:
        source = site.producer or site.rows_before
        if site.linears == (linear,) and source is not None and not site.producer_is_value:
            module, _, _ = source.rpartition(".")
            before = next(other for other in sites if source in other.linears)
            return tuple(name for name in before.linears if name.rpartition(".")[0] == module)
    is_last = linear in sites[-1].linears
    return (family.inner_rows,) if is_last and family.inner_rows is not None else ()
