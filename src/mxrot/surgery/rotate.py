"""A rotation of the residual stream, merged into the weights on both sides of it (SpinQuant's R1, arXiv 2405.16406,
section 3.1; QuaRot, 2404.00456, section 4). Nothing is computed at run time, and the model's function stays the same.

With h the stream, a row vector, everything that writes to it now writes h R: embedding E R, o and down R^T W. Readers
get W G R, with G the gain of their norm. The gain is folded first, because only a norm without gains commutes with R.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from mxrot.errors import ConfigError
from mxrot.models import ChangedSource, Source
from mxrot.surgery.fold_norms import (
    check_rotatable,
    gain_of,
    gain_of_one,
    gains_by_reader,
    gains_of_one,
    inner_readers,
    product_by_rows,
    rounded,
)

TOLERANCE = 1e-9
"""The largest difference of R^T R from the identity: a hundred thousand roundings of float64. A matrix in float32 is
off by 1e-7."""


class Rotated(ChangedSource):
    """Norm gains folded as by `FoldedNorms`, and the residual stream rotated by an orthogonal `matrix` [H, H].

    Computed in float64, on the device of the matrix or of the weights, and rounded once to the stored type of each
    weight. ConfigError as for `FoldedNorms`, and for a matrix of another size, or one that is not orthogonal in
    float64.
    """

    def __init__(self, inner: Source, matrix: Tensor) -> None:
        check_rotatable(inner)
        width = inner.config.get_text_config().hidden_size
        self.matrix = matrix.detach().double().contiguous()
        check_orthogonal(self.matrix, (width, width), inner.name)
        super().__init__(inner, f"rotated by {digest_of(self.matrix)}")

    def changed_outer(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        family = self.family
        head, norm, embedding = (f"{name}.weight" for name in (family.head, family.final_norm, family.embedding))
        return tensors | {
            embedding: product_by_rows(embedding, tensors[embedding], matrix=self.matrix),
            head: product_by_rows(head, tensors[head], gain_of(tensors[norm], family.norms_add_one), self.matrix),
            norm: gain_of_one(tensors[norm], family.norms_add_one),
        }

    def changed_block(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        prefix = self.family.block_prefix(index)
        matrix = self.matrix.to(next(iter(tensors.values())).device)
        sites = self.family.sites_of(index)
        inner = inner_readers(sites)
        exact = {name: tensors[name].double() * gain for name, gain in gains_by_reader(sites, tensors).items()}
        exact = {name: weight if name in inner else weight @ matrix for name, weight in exact.items()}
        writers = [linear for site in sites if site.writes_residual for linear in site.linears]
        for name in (f"{linear}.{kind}" for linear in writers for kind in ("weight", "bias")):
            if name in tensors:  # the bias is optional
                exact[name] = matrix.T @ exact.get(name, tensors[name].double())
        found = {name: self.as_stored(f"{prefix}.{name}", weight) for name, weight in exact.items()}
        return tensors | gains_of_one(sites, tensors) | found

    def as_stored(self, name: str, exact: Tensor) -> Tensor:
        """A float64 tensor in the stored type of its full name. NumericsError as for `rounded`."""
        return rounded(name, exact, self.type_of(name))


@dataclass(frozen=True)
class Rotations:
    """Rotations to be merged into the weights of a model; float64."""

    residual: Tensor | None = None
    """[H, H], the rotation of the residual stream; None leaves it unchanged."""
    value_heads: Tensor | None = None
    """[decoder blocks, D, D], the rotations of the values; None leaves them unchanged."""


def check_orthogonal(matrices: Tensor, shape: tuple[int, ...], where: str) -> None:
    """Raise ConfigError unless these are orthogonal matrices [..., B, B] of this shape, in float64."""
    if matrices.shape != shape:
        raise ConfigError(f"{where}: a rotation of shape {list(matrices.shape)}; expected {list(shape)}")
    identity = torch.eye(shape[-1], dtype=torch.float64, device=matrices.device)
    error = float((matrices.mT @ matrices - identity).abs().max())
    if not error < TOLERANCE:
        raise ConfigError(
            f"{where}: a rotation that is off by {error:.2g} from an orthogonal matrix; expected less than "
            f"{TOLERANCE:g}, as float64 gives it"
        )


def digest_of(matrices: Tensor) -> str:
    """A digest of these numbers: 16 letters."""
    return hashlib.sha256(matrices.cpu().numpy().tobytes()).hexdigest()[:16]
