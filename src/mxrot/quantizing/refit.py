"""Refit the transform of a site after its weights are quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mxrot.calibration.site_inputs import SiteInputs
from mxrot.calibration.site_weights import Rows, SiteWeights
from mxrot.models import Site
from mxrot.quantizing.finite import check_transform
from mxrot.quantizing.part import BlockRun, Part
from mxrot.quantizing.rounded import RoundedLinear
from mxrot.transforms import BlockDiagonal, SiteTransform
from mxrot.transforms.refit import added_to_diagonal, by_block, diagonal_blocks, refit_correction


def refitted(
    run: BlockRun,
    part: Part,
    site: Site,
    transform: SiteTransform | None,
    rounded: Mapping[str, RoundedLinear],
) -> SiteTransform | None:
    """The refitted transform, as a checkpoint will hold it, of a site whose linears are about to be replaced.

    The moments and the target of the recipe's rounding are computed again. The transform is unchanged if the recipe
    refits none, or if none is applied at run time.
    """
    recipe, scheme = run.of(part, site)
    if recipe.refit is None or transform is None or transform.matrices is None:
        return transform
    assert part.executor is not None
    weights = SiteWeights(part.weights, site.linears, transform)
    seen = SiteInputs(part.executor, site, transform, scheme.activations)
    requirements = recipe.rounding.requirements
    shift = None
    if part.original is None or requirements.target == "own":
        hessian = seen.hessian(weights, requirements)
    else:
        hessian, shift = seen.hessian_and_shift(part.original, weights, requirements)
    part.executor.forget_inputs()
    start = transform.matrices
    size = start.shape[-1]
    gram, wanted = torch.zeros_like(hessian), torch.zeros_like(hessian)
    for rows in weights.groups:
        codes = _codes(rows, rounded)
        lacks = (weights.folded(rows) - codes) @ hessian
        if shift is not None:
            lacks += shift[rows.place]
        gram += codes.T @ codes
        wanted += lacks.T @ codes
        del codes, lacks
    added = added_to_diagonal(hessian, gram, recipe.refit.damping)
    del shift, weights
    columns = by_block(hessian, size)
    del hessian  # the solver takes two more matrices of that size
    columns_of_gram = by_block(gram, size)
    del gram
    goal = diagonal_blocks(wanted, size)
    correction = refit_correction(columns, columns_of_gram, goal, added, len(start) == 1)
    moved = BlockDiagonal(start + start @ correction)
    found = replace(transform, stages=(*transform.stages[:-1], moved)).as_applied()
    check_transform(found, f"{part.name}.{site.linears[0]}")
    return found


def _codes(rows: Rows, rounded: Mapping[str, RoundedLinear]) -> Tensor:
    """The dequantized weights of some rows of a site, float64 [n, K]."""
    pieces = []
    for name, first, last in rows.pieces:
        weight = rounded[name].weight
        _, own, _ = weight.split_rows([first, last - first, weight.shape[0] - last])
        pieces.append(own.dequantize(torch.float64))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
