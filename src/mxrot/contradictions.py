"""Tables of a recipe that cannot be combined. Each problem is one sentence that says what to do."""

from __future__ import annotations

from collections.abc import Iterator

from mxrot.formats import LookUpTable, TensorQuantizer, Uniform
from mxrot.rounding import RoundingMethod
from mxrot.sections import AttentionChoice, CacheChoice, QuantizerChoice, Rotation, Tuning
from mxrot.transforms import BlockDiagonalSpec, Sharing, TransformMethod


def tuning_problems(
    tuning: Tuning,
    activations: QuantizerChoice | None,
    weights: TensorQuantizer,
    transform: TransformMethod,
    sharing: Sharing,
    rounding: RoundingMethod,
) -> Iterator[str]:
    """Why a model that is quantized in this way cannot be tuned."""
    if activations is None:
        yield "tuning needs quantized activations"
    if tuning.moves == "levels":
        if not isinstance(weights.format.grid, LookUpTable):
            yield f'tuning moves = "levels" needs look-up tables, and {weights.format.name} has none; take lut2'
        return
    if tuning.moves == "gains":
        if not weights.is_exact_in_bfloat16:
            yield f"tuning cannot hold {weights.format.name} in bfloat16"
        return
    if not isinstance(weights.format.grid, Uniform):
        yield f"tuning moves codes under one scale a block, and {weights.format.name} has others"
    if tuning.moves == "clipping":
        if not weights.rule.sees_extremes_only or weights.looks_at_whole_tensor:
            yield (
                f"tuning clips scales that are made from the ends of each block, and rule {weights.rule.name!r} of "
                f"{weights.format.name} looks at more"
            )
        if rounding.requirements.hessian:
            yield (
                f"tuning clips weights that are rounded to nearest, and rounding {rounding.name} does otherwise; "
                'set rounding.method = "rtn"'
            )
        return
    if not weights.is_exact_in_bfloat16:
        yield f"tuning cannot hold {weights.format.name} in bfloat16"
    stages = transform.own_specs(transform.block, sharing)
    if len(stages) > 1 or not all(isinstance(stage, BlockDiagonalSpec) for stage in stages):
        kinds = ", ".join(stage.kind for stage in stages)
        yield f"tuning moves one block-diagonal stage, and transform {transform.name} is of {kinds}"


def table_problems(
    rotation: Rotation | None, tuning: Tuning | None, attention: AttentionChoice | None, cache: CacheChoice | None
) -> Iterator[str]:
    """Combinations with attention, and with a quantized cache, that are not supported."""
    trains = rotation is not None and rotation.steps > 0
    if attention is not None and (tuning is not None or trains):
        yield (
            "tuning and trained rotations were not tried through quantized products of attention; leave out the table "
            "[attention], or set tuning = none and rotation.steps = 0"
        )
    if attention is not None and cache is not None:
        yield (
            "[attention] quantizes the operands of attention's products, and [cache] what is kept of tokens: no "
            "attention does both; leave one of the tables out"
        )
    if cache is None or not trains:
        return
    if cache.is_fitted:
        yield (
            "rotations are trained before the cache's transforms are fitted, and cannot know them; set "
            'cache.transform = "hadamard", or rotation.steps = 0'
        )
    if cache.turns_values(rotation):
        yield (
            'rotations would be trained without the Hadamard matrix that cache.transform = "hadamard" merges into the '
            "values; set rotation.value_heads, which takes its place"
        )
