"""How much memory quantizing takes, stage by stage: counted from what the pipeline holds.

A stage is a moment at which many tensors are alive; the peak is the largest of them. Each term of a stage has a name,
so that a plan can say what fills the memory, and what to change. Where the code keeps what fits below a bound (a
norm's outputs, a site's inputs), so does this.

The formulas follow quantizing/, calibration/ and tuning/, those of site_memory.py also rounding/; tests compare them
with the tensors that are really alive during a run. What is not counted: workspaces of matrix libraries and what an
allocator loses between tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mxrot.calibration.generation import SEQUENCE_TOKENS, cache_bytes, sequences_within
from mxrot.planning.ordering import ordering_stages
from mxrot.planning.run import Run, reads_residual
from mxrot.planning.shape import SiteShape
from mxrot.planning.site_memory import Stage, forward_bytes, site_stages
from mxrot.planning.training import training_stages
from mxrot.surgery.fold_norms import ROWS
from mxrot.tuning.network import CHECKPOINT_BYTES, LOGIT_TOKENS

PROCESS_BYTES = {"cpu": 5e8, "cuda": 3e9}
"""Of main memory: the code of PyTorch and transformers (measured on Linux); with a GPU also its driver and libraries
(assumed)."""
KEPT_SHARE, MOST_KEPT = 0.45, 2.5e8
"""What the allocator holds back within a site (heap.py), relative to the tensors alive, and at most: glibc maps tensors
of more than 32 MiB one by one. Both were measured on Linux."""
TUNED_BYTES = 28.2
"""A tunable weight, besides its code and scale: value and two distances, what rounding took away (2 each), offset, its
gradient, two averages of Adam, the best so far (4 each), and the moved weight."""
CLIPPED_BYTES = 14.0
"""The same while only the ends of its blocks are learned: the weight, what it is rounded to, and its gradient."""
LEARNED_BYTES = 16.0
"""The same of a two-bit weight that is learned: its gradient, two averages of Adam, the best so far (4 each). To it
come itself (4), the same of the seven numbers of its block with what they become (about 2), and its looked-up value."""
LOOKED_UP_BYTES = 50.0
"""On the way back through one of the weights that are looked up, for each element of it."""


@dataclass(frozen=True)
class MemoryEstimate:
    """The stages of a run, in the order in which they come."""

    stages: tuple[Stage, ...]

    @property
    def peak(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.total)


def estimate_memory(run: Run) -> MemoryEstimate:
    """Of the device that computes: main memory on a CPU, the GPU's own on a GPU."""
    process = {} if run.is_gpu else {"the process": PROCESS_BYTES["cpu"]}
    stages = [*training_stages(run), *_loading(run), *_writing_text(run), *_rotating(run), *ordering_stages(run)]
    for position, _ in enumerate(run.shape.fullest):
        stages += site_stages(run, position, _resident(run, position) | _remembered(run, position))
    stages += [*_block_end(run), *_tuning(run)]
    return MemoryEstimate(
        tuple(Stage(stage.name, _named(process | stage.terms | _kept_back(run, stage))) for stage in stages)
    )


def _kept_back(run: Run, stage: Stage) -> dict[str, float]:
    """What the allocator of main memory does not give back before the site is done."""
    return {} if run.is_gpu else {"what the allocator keeps": min(KEPT_SHARE * stage.total, MOST_KEPT)}


def estimate_host_memory(run: Run) -> MemoryEstimate:
    """Main memory beside a GPU."""
    process = {"the process and the GPU's driver": PROCESS_BYTES["cuda"]}
    outer = {"embedding, last norm and head, as they are read": run.shape.outer_parameters * run.stored.itemsize}
    if run.rotates_residual:
        outer["the same, rotated"] = run.shape.outer_parameters * run.stored.itemsize
    block = {"a finished block, as it is written": 2 * run.packed_block}
    if run.is_on_host:
        block |= _states(run) | {"outputs of attention and MLP": _outputs_of_children(run)}
        block |= {"tokens that experts read": max(_read_by_experts(run, site) for site in run.shape.fullest)}
    return MemoryEstimate((Stage("embedding and head", process | outer), Stage("blocks", _named(process | block))))


def _read_by_experts(run: Run, here: SiteShape) -> float:
    """Bytes of the tokens of all experts of a block, where statistics are taken of what each of them gets."""
    recipe = run.recipe
    looks = recipe.smoothing is not None or any(
        one.rounding.requirements.hessian or one.transform.needs for one in recipe.variants
    )
    streams = 2 if run.sees_original else 1
    return float(streams * run.stream_bytes) if here.site.is_of_experts and looks else 0.0


def _states(run: Run) -> dict[str, float]:
    """Between two blocks."""
    is_twice = run.recipe.looks_at_original and len(run.shape.blocks) > 1
    return {
        "hidden states": float(run.stream_bytes),
        "hidden states of the original": float(run.stream_bytes) if is_twice else 0.0,
    }


def _outputs_of_children(run: Run) -> float:
    """Of all of a block's submodules with sites, once the block is done."""
    children = len({site.child for site in run.shape.fullest})
    return float(children * (2 if run.sees_original else 1) * run.stream_bytes)


def _named(terms: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in terms.items() if value}


def _loading(run: Run) -> list[Stage]:
    terms = {"embedding, last norm and head": float(run.shape.outer_parameters * run.itemsize)}
    if not run.is_gpu:
        terms["the same, as they are read"] = run.shape.outer_parameters * run.stored.itemsize
    found = [Stage("loading", terms | _rotations(run))]
    if run.rotates_residual:
        rows = min(ROWS, run.shape.vocabulary)
        found.append(
            Stage(
                "rotating embedding and head",
                _rotations(run)
                | {
                    "some of their rows in float64": 16.0 * rows * run.shape.hidden,
                    "both as they are read, and rotated": 0.0
                    if run.is_gpu
                    else 2.0 * run.shape.outer_parameters * run.stored.itemsize,
                },
            )
        )
    return found


def _rotations(run: Run) -> dict[str, float]:
    """The matrices that are merged into the weights, which are kept as long as these are read."""
    return {"rotations": float(run.rotation_bytes)} if run.rotation_bytes else {}


def _rotating(run: Run) -> list[Stage]:
    """A block that is read, and its rotated weights."""
    if not run.rotation_bytes:
        return []
    resident = _resident(run, 0)
    for later in ("the block in float32", "the block of the original"):
        resident.pop(later, None)
    largest = max(rows * site.inputs for site in run.shape.fullest for rows in site.rows)
    beside = {
        "the block before it was rotated": float(run.shape.block_parameters * run.stored.itemsize),
        "a weight in float64, twice": 16.0 * largest,
    }
    return [Stage("rotating a block", resident | beside)]


def _writing_text(run: Run) -> list[Stage]:
    if not run.recipe.calibration.writes or run.recipe.is_data_free:
        return []
    written = (run.all_windows - run.windows) * run.seq_len
    original = {"the original model": run.model_bytes, **_rotations(run)}
    return [Stage("writing calibration text", original | _generation(run, written))]


def _generation(run: Run, tokens: int) -> dict[str, float]:
    """What writing so many tokens takes besides the model."""
    length = min(SEQUENCE_TOKENS, run.seq_len)
    keys = cache_bytes(run.shape.config, length, run.itemsize)
    sequences = min(-(-tokens // length), sequences_within("cuda" if run.is_gpu else "cpu", keys, run.model_bytes))
    # Logits, their probabilities, and the sums of these, the last two in float32.
    logits = sequences * run.shape.vocabulary * (run.itemsize + 8.0)
    return {"keys and values": float(sequences * keys), "logits and probabilities": logits}


def _resident(run: Run, position: int) -> dict[str, float]:
    """What is alive during all of site `position`, but for what passes have left behind."""
    shape, recipe, s = run.shape, run.recipe, run.itemsize
    sites = shape.fullest
    weights = sum(site.weights for site in sites)
    # A GPU computes in the type that was read, with the very same tensors.
    read = shape.block_parameters - (0 if run.is_gpu else _smoothed(run))
    terms = {
        "embedding, last norm and head": float(shape.outer_parameters * s),
        **_rotations(run),
        **({} if run.is_on_host else _states(run)),
        "masks": float(run.mask_bytes if run.tokens else 0),
        "the block as it was read": float(read * run.stored.itemsize),
        "weights that smoothing has changed": 8.0 * _smoothed(run),
        "the block of the original": float(shape.block_parameters * s) if recipe.looks_at_original else 0.0,
    }
    if not run.is_gpu:
        left = shape.block_parameters - sum(site.weights for site in sites[:position])
        terms["the block in float32"] = 4.0 * left
    terms["the quantized block"] = run.packed_block * sum(site.weights for site in sites[:position]) / max(1, weights)
    if run.keeps_model or recipe.tunes_network:
        terms["finished blocks"] = run.packed_block * (len(shape.blocks) - 1)
    if recipe.keeps_remainders:
        kept = shape.quantized_weights - weights if recipe.tunes_network else 0
        own = sum(site.weights for site in sites[:position])
        terms["what rounding took away"] = 2.0 * (kept + own)
    return terms


def _smoothed(run: Run) -> int:
    """Weights of a block that are float64 numbers, because smoothing scales are in them."""
    smoothing = run.recipe.smoothing
    if smoothing is None:
        return 0
    smoothed = (here for here in run.shape.fullest if here.site.group not in smoothing.skip)
    sites = [here for here in smoothed if here.recipe.sharing == "site"]
    changed = {linear for here in sites for linear in (*here.site.linears, here.site.producer)}
    return sum(
        rows * here.inputs
        for here in run.shape.fullest
        for linear, rows in zip(here.site.linears, here.rows, strict=True)
        if linear in changed
    )


def _remembered(run: Run, position: int) -> dict[str, float]:
    """What passes over the calibration windows have left for later ones."""
    if not run.tokens:
        return {}
    sites, here = run.shape.fullest, run.shape.fullest[position]
    streams = 2 if run.sees_original else 1
    requirements = here.recipe.rounding.requirements
    before = {site.child for site in sites[:position]} - {here.child}
    ends = all(site.child != here.child for site in sites[position + 1 :])
    of_children = len(before) * streams + (1 if ends and run.sees_original else 0)
    has_norm = any(site.site.norm is not None for site in sites if site.child == here.child)
    of_norm = streams * min(run.stream_bytes, run.remembered) if has_norm and not run.is_on_host else 0
    read = _read_by_experts(run, here)
    return {
        "tokens that experts read": 0.0 if run.is_on_host else read,
        "tokens of one expert": here.share * read,
        "outputs of attention and MLP": 0.0 if run.is_on_host else float(of_children * run.stream_bytes),
        "outputs of the norm": float(of_norm),
        "inputs of the site": _kept_inputs(run, here, ends)
        if requirements.hessian or here.recipe.transform.needs
        else 0.0,
    }


def _kept_inputs(run: Run, here: SiteShape, ends: bool) -> float:
    """Bytes of what goes into a site, as far as they are kept from one pass to the next."""
    whole = here.share * run.tokens * here.inputs * run.itemsize
    requirements = here.recipe.rounding.requirements
    kept = beside = 0.0
    if requirements.hessian:
        beside = float(run.stream_bytes) if reads_residual(run, here) else 0.0
        share = min(1.0, run.remembered / (whole + beside))
        kept, beside = share * whole, share * beside
        if run.shape.fullest[0].child == here.child:
            beside = 0.0  # that of the first child is the hidden states themselves
    if here.site.norm is not None:
        kept = 0.0  # the outputs of the norm
    elif ends and len(here.rows) == 1:
        kept = max(kept, min(whole, run.remembered))
    return kept + beside


def _block_end(run: Run) -> list[Stage]:
    """The block's outputs become the next one's inputs."""
    if not run.tokens:
        return []
    last = len(run.shape.fullest) - 1
    base = _resident(run, last)
    known = {"outputs of attention and MLP": 0.0 if run.is_on_host else _outputs_of_children(run)}
    stages = [Stage("the block's outputs", base | known | {"one batch": forward_bytes(run, last)})]
    options = run.recipe.tuning
    if options is not None and options.scope == "block":
        weights = sum(site.weights for site in run.shape.fullest)
        tokens = options.batch_windows * run.seq_len
        each = {"clipping": CLIPPED_BYTES, "gains": _frozen_bytes(run)}.get(options.moves, TUNED_BYTES)
        tuned = {
            "tunable weights": each * weights,
            "activations": tokens * activation_bytes(run, run.shape.fullest),
        }
        stages.append(Stage("tuning the block", base | known | tuned))
    return stages


def activation_bytes(run: Run, sites: tuple[SiteShape, ...]) -> float:
    """What a backward pass keeps of one token in one block, as tuning/network.py has it."""
    return 8.0 * (sum(rows + site.inputs for site in sites for rows in site.rows) + run.token_scores)


def _frozen_bytes(run: Run) -> float:
    """A weight whose code stays: its value, in the type of products."""
    return 2.0 if run.is_gpu else 4.0


def _tuning(run: Run) -> list[Stage]:
    """Distillation of the whole network."""
    options, shape = run.recipe.tuning, run.shape
    if options is None or not run.recipe.tunes_network:
        return []
    blocks, weights = len(shape.blocks), shape.quantized_weights
    original = {"the original model": float(shape.parameters * run.itemsize), **_rotations(run)}
    packed = {"the quantized model": blocks * run.packed_block + shape.outer_parameters * run.itemsize}
    stages = []
    if most := max(options.generated, options.rollouts):
        written = max(1, round(most * run.tuned_windows)) * run.seq_len
        kept = {"what rounding took away": 2.0 * weights} if run.recipe.keeps_remainders else {}
        stages.append(Stage("writing text to tune on", original | packed | kept | _generation(run, written)))
    tokens = options.batch_windows * run.seq_len
    activations = tokens * sum(activation_bytes(run, sites) for sites in shape.blocks)
    if activations > CHECKPOINT_BYTES:
        activations = tokens * (activation_bytes(run, shape.fullest) + 4.0 * shape.hidden * blocks)
    wide = {"embedding, last norm and head in float32": 4.0 * shape.outer_parameters}
    is_bounded = getattr(shape.config, "final_logit_softcapping", None) is not None
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


def gigabytes(count: float) -> str:
    """Bytes for people: three digits that count."""
    value = count / 1e9
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{min(digits, 3)}f} GB"
