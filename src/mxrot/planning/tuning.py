"""The memory and the work of tuning. They follow tuning/."""

from __future__ import annotations

from math import prod

from mxrot.planning.run import Run
from mxrot.planning.shape import SiteShape
from mxrot.planning.stage import Stage, merged_rotations
from mxrot.planning.writing import writing_terms, writing_work
from mxrot.transforms import BlockDiagonalSpec
from mxrot.tuning.network import CHECKPOINT_BYTES, LOGIT_TOKENS

TUNED_BYTES = 28.2
"""The bytes of a tunable weight, without its code and scale: value, two distances and rounding error (2 each), offset,
gradient, two averages of Adam and best value (4 each), and the moved weight."""
CLIPPED_BYTES = 14.0
"""The same if only the ends of its block are learned: the weight, its rounded value, and its gradient."""
LEARNED_BYTES = 16.0
"""The same for a learned two-bit weight: its gradient, two averages of Adam, and the best value (4 each). In addition,
there are the weight (4), these terms for the seven numbers of its block and their results (about 2), and its looked-up
value."""
LOOKED_UP_BYTES = 50.0
"""The bytes per element in the backward pass through a looked-up weight."""


def block_tuning_terms(run: Run) -> dict[str, float]:
    """The memory if a block is tuned on its own."""
    options = run.recipe.tuning
    if options is None or options.scope != "block":
        return {}
    weights = sum(site.weights for site in run.shape.fullest)
    tokens = options.batch_windows * run.seq_len
    each = {"clipping": CLIPPED_BYTES, "gains": _frozen_bytes(run)}.get(options.moves, TUNED_BYTES)
    return {"tunable weights": each * weights, "activations": tokens * activation_bytes(run, run.shape.fullest)}


def activation_bytes(run: Run, sites: tuple[SiteShape, ...]) -> float:
    """The bytes that a backward pass keeps per token and block, as in tuning/network.py."""
    return 8.0 * (sum(rows + site.inputs for site in sites for rows in site.rows) + run.token_scores)


def _frozen_bytes(run: Run) -> float:
    """The bytes of a weight with a fixed code: its value, in the type of products."""
    return 2.0 if run.is_gpu else 4.0


def tuning_stages(run: Run) -> list[Stage]:
    """The stages of memory for distillation of the whole network."""
    options, shape = run.recipe.tuning, run.shape
    if options is None or not run.recipe.tunes_network:
        return []
    blocks, weights = len(shape.blocks), shape.quantized_weights
    original = {"the original model": float(shape.parameters * run.itemsize), **merged_rotations(run)}
    packed = {"the quantized model": blocks * run.packed_block + shape.outer_parameters * run.itemsize}
    stages = []
    if most := max(options.generated, options.rollouts):
        written = writing_terms(run, max(1, round(most * run.tuned_windows)))
        kept = {"what rounding took away": 2.0 * weights} if run.recipe.keeps_remainders else {}
        stages.append(Stage("writing text to tune on", original | packed | kept | written))
    tokens = options.batch_windows * run.seq_len
    activations = tokens * sum(activation_bytes(run, sites) for sites in shape.blocks)
    if activations > CHECKPOINT_BYTES:
        activations = tokens * (activation_bytes(run, shape.fullest) + 4.0 * shape.hidden * blocks)
    wide = {"embedding, last norm and head in float32": 4.0 * shape.outer_parameters}
    is_bounded = getattr(shape.config.get_text_config(), "final_logit_softcapping", None) is not None
    logits = min(tokens, LOGIT_TOKENS) * shape.vocabulary * (12.0 if is_bounded else 10.0)
    learns = options.moves == "levels"
    each = _frozen_bytes(run) if options.moves == "gains" else TUNED_BYTES
    if learns:
        each = LEARNED_BYTES * (options.offset_rate > 0) + 6.0 + (2 if run.is_gpu else 4)
    tuned = {
        "tunable weights": each * weights,
        "activations": activations + 8.0 * tokens * shape.hidden,
        "logits": logits,
    }
    if learns:
        largest = max(rows * site.inputs for site in shape.fullest for rows in site.rows)
        tuned["the way back through one weight"] = LOOKED_UP_BYTES * largest
    stages.append(Stage("tuning", original | packed | wide | tuned))
    return stages


def tuning_work(run: Run) -> dict[str, float]:
    """The amounts of work, by the name of their rate, for the steps of distillation or of block-wise reconstruction."""
    options, shape = run.recipe.tuning, run.shape
    if options is None:
        return {}
    weights = shape.quantized_weights
    tokens = options.batch_windows * run.seq_len
    blocks = len(shape.blocks)
    looks = 1 + min(options.checks, options.steps)
    held_out = max(1.0, options.held_out * run.all_windows) / options.batch_windows
    steps = options.all_steps + looks * held_out / 4
    kept = sum(activation_bytes(run, sites) for sites in shape.blocks)
    # Forward and backward passes of the quantized model, with recomputation, and a forward pass of the original.
    # The data kept for the backward pass are read and written about ten times in all.
    found = {
        "product": 10.0 * tokens * weights * steps,
        "copy": steps * (80.0 * weights + 10.0 * tokens * kept),
        "quantized": 2.0 * steps * tokens * sum(site.inputs for sites in shape.blocks for site in sites),
        "operations": steps * (50.0 if run.is_gpu else 200.0 * blocks),
    }
    if run.recipe.tunes_network:
        found["product"] += 8.0 * tokens * shape.vocabulary * shape.hidden * steps
        found["copy"] += 30.0 * tokens * shape.vocabulary * steps
    return found


def tuning_texts_work(run: Run) -> list[dict[str, float]]:
    """The amounts for the text that is written to tune on."""
    options = run.recipe.tuning
    if options is None or not run.recipe.tunes_network:
        return []
    return [writing_work(run, each * run.tuned_windows) for each in (options.generated, options.rollouts)]


def gradient_bytes(run: Run) -> float:
    """The bytes of the gradients in all steps of tuning: float32, as processes exchange them, without gains of
    norms."""
    options, shape = run.recipe.tuning, run.shape
    if options is None:
        return 0.0
    sites = [site for sites in shape.blocks for site in sites]
    corrections = sum(_correction(site) for site in sites)
    weights = shape.quantized_weights
    blocks = sum(site.weights / (site.recipe.weights.quantizer().format.block or site.inputs) for site in sites)
    learned = {
        "rounding": weights + corrections * (options.transform_rate > 0) + blocks * (options.exponent_rate > 0),
        "clipping": 2.0 * blocks,
        "levels": weights * (options.offset_rate > 0) + 7.0 * blocks,
        "gains": corrections * (options.transform_rate > 0),
    }[options.moves]
    lightly = (options.light_steps + options.polish_steps) * corrections * (options.light_transform_rate > 0)
    return 4.0 * (options.steps * learned + lightly)


def _correction(here: SiteShape) -> float:
    """The numbers of a site's learned transform: the last stage, if it is block diagonal."""
    last = here.scheme.stages[-1] if here.scheme.stages else None
    if not isinstance(last, BlockDiagonalSpec):
        return 0.0
    shape, _ = last.tensors(here.inputs)["weight"]
    return float(prod(shape))
