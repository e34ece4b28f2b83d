"""Norm gains folded into what reads them: every norm of the residual stream then only divides by the mean square.

Such a norm commutes with a rotation of the stream (QuaRot, arXiv 2404.00456, section 3; SliceGPT, 2401.15024).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mxrot.errors import ConfigError, NumericsError
from mxrot.models import ChangedSource, Family, Site, Source


class FoldedNorms(ChangedSource):
    """Gains are 1, and the columns of the linears that read a norm are multiplied by what its gain was.

    In float64, rounded once to the type that each weight is stored in. Of the final norm it is the head that takes the
    gain; norms of queries and keys stay as they are. ConfigError for a family whose residual stream is not that simple
    (`Family.is_rotatable`), and for a head that is the embedding.
    """

    def __init__(self, inner: Source) -> None:
        check_rotatable(inner)
        super().__init__(inner, "norms folded")

    def changed_outer(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        head, norm = f"{self.family.head}.weight", f"{self.family.final_norm}.weight"
        folded = product_by_rows(head, tensors[head], gain_of(tensors[norm], self.family.norms_add_one))
        return tensors | {head: folded, norm: gain_of_one(tensors[norm], self.family.norms_add_one)}

    def changed_block(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        prefix = self.family.block_prefix(index)
        folded = {
            name: rounded(f"{prefix}.{name}", tensors[name].double() * gain, tensors[name].dtype)
            for name, gain in gains_by_reader(self.family.sites_of(index), tensors).items()
        }
        return tensors | folded | gains_of_one(self.family.sites_of(index), tensors)


def check_rotatable(source: Source) -> None:
    """ConfigError unless gains can be folded away, and the residual stream rotated."""
    problem = rotation_problem(source.family, source.name)
    if problem is not None:
        raise problem
    if source.config.tie_word_embeddings:
        raise ConfigError(
            f"{source.name}: the head is the embedding, and cannot take the gain of the final norm alone; untie it "
            "first (Untied)"
        )


def rotation_problem(family: Family, where: str) -> ConfigError | None:
    """Why the residual stream of a family cannot be rotated; None if it can."""
    if family.is_rotatable:
        return None
    return ConfigError(
        f"{where}: no rotation of the residual stream of family {family.name} can be merged into the weights: "
        f"{family.rotation_obstacle}; take a recipe that rotates online"
    )


def gains_by_reader(sites: Sequence[Site], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of each weight of a block with these sites that reads a norm, the gain of this norm, float64 [K]."""
    return {
        f"{reader}.weight": gain_of(tensors[f"{site.norm}.weight"], site.norm_adds_one)
        for site in sites
        if site.norm is not None
        for reader in (*site.linears, *site.routers)
    }


def inner_readers(sites: Sequence[Site]) -> frozenset[str]:
    """The weights of a block with these sites that read a norm which is not one of the residual stream."""
    readers = (name for site in sites if site.norm_is_inner for name in (*site.linears, *site.routers))
    return frozenset(f"{reader}.weight" for reader in readers)


def gains_of_one(sites: Sequence[Site], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The norms that these sites of a block read, with gains of 1."""
    norms = dict.fromkeys((f"{site.norm}.weight", site.norm_adds_one) for site in sites if site.norm is not None)
    return {norm: gain_of_one(tensors[norm], adds_one) for norm, adds_one in norms}


def gain_of(weight: Tensor, adds_one: bool) -> Tensor:
    """What a norm multiplies by, float64 [H]."""
    return 1 + weight.double() if adds_one else weight.double()


def gain_of_one(weight: Tensor, adds_one: bool) -> Tensor:
    """The weight of a norm that only divides, [H] of the type of `weight`."""
    return torch.zeros_like(weight) if adds_one else torch.ones_like(weight)


ROWS = 8192
"""Of a tensor that is outside of the blocks, at once: an embedding in float64 is large."""


def product_by_rows(name: str, tensor: Tensor, gain: Tensor | None = None, matrix: Tensor | None = None) -> Tensor:
    """Rows [V, H], times a gain [H], times a matrix [H, H], in float64 on its device; rounded once to the type of
    `tensor`, and on its device again."""
    found = torch.empty_like(tensor)
    device = tensor.device if matrix is None else matrix.device
    for part, target in zip(tensor.split(ROWS), found.split(ROWS), strict=True):
        exact = part.to(device).double()
        exact = exact if gain is None else exact * gain.to(device)
        target.copy_(rounded(name, exact if matrix is None else exact @ matrix, tensor.dtype))
    return found


def rounded(name: str, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """A float64 weight in the type that it is stored in; NumericsError if that does not reach so far."""
    found = exact.to(dtype)
    if not torch.isfinite(found).all():
        raise NumericsError(f"{name}: {exact.abs().max():.4g} is too large for {dtype}, in which it is stored")
    return found
