"""The memory that quantizing takes, stage by stage, counted from the tensors of the pipeline.

A stage is a moment at which many tensors are alive. The peak is the largest stage. Each term of a stage has a name, so
that a plan can say what fills the memory, and what to change. Where the code keeps tensors below a bound (a norm's
outputs, a site's inputs), so do these formulas.

The formulas follow quantizing/, calibration/ and tuning/. Those of site_memory.py also follow rounding/. Tests compare
them with the tensors that are alive during a run. Workspaces of matrix libraries and the allocator's gaps between
tensors are not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mxrot.calibration.writing_sizes import WRITING
from mxrot.planning.heads import HEAD, coded_terms, head_stages
from mxrot.planning.ordering import ordering_stages
from mxrot.planning.run import Run, keeps_share, reads_residual
from mxrot.planning.shape import SiteShape
from mxrot.planning.site_memory import forward_bytes, site_stages
from mxrot.planning.stage import Stage, merged_rotations
from mxrot.planning.training import training_stages
from mxrot.planning.tuning import block_tuning_terms, tuning_stages
from mxrot.planning.writing import writing_stages
from mxrot.surgery.fold_norms import ROWS

PROCESS_BYTES = {"cpu": 5e8, "cuda": 3e9}
"""The main memory for the code of PyTorch and transformers (measured on Linux), with a GPU also for its driver and
libraries (assumed)."""
KEPT_SHARE, MOST_KEPT = 0.45, 2.5e8
"""The memory that the allocator holds back within a site (heap.py), relative to the tensors alive, and at most. glibc
maps tensors of more than 32 MiB one by one. Both were measured on Linux."""
OF_EXPERT, INPUTS = "tokens of one expert", "inputs of the site"
"""The names of the data that a site keeps of the windows."""


@dataclass(frozen=True)
class MemoryEstimate:
    """The stages of a run, in their order."""

    stages: tuple[Stage, ...]

    @property
    def peak(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.total)


def estimate_memory(run: Run) -> MemoryEstimate:
    """The memory of the computing device: main memory on a CPU, the GPU's own on a GPU."""
    process = {} if run.is_gpu else {"the process": PROCESS_BYTES["cpu"]}
    stages = [*training_stages(run), *_loading(run), *writing_stages(run), *_rotating(run), *ordering_stages(run)]
    for position, _ in enumerate(run.shape.fullest):
        stages += site_stages(run, position, _resident(run, position) | _remembered(run, position))
    stages += [*_block_end(run), *tuning_stages(run), *head_stages(run)]
    return MemoryEstimate(
        tuple(Stage(stage.name, _named(process | stage.terms | _kept_back(run, stage))) for stage in stages)
    )


def _kept_back(run: Run, stage: Stage) -> dict[str, float]:
    """The memory that the allocator of main memory returns only when the site is done."""
    return {} if run.is_gpu else {"what the allocator keeps": min(KEPT_SHARE * stage.total, MOST_KEPT)}


def estimate_host_memory(run: Run) -> MemoryEstimate:
    """The main memory of a run that computes on a GPU."""
    process = {"the process and the GPU's driver": PROCESS_BYTES["cuda"]}
    outer = {"embedding, last norm and head, as they are read": run.shape.outer_parameters * run.stored.itemsize}
    if run.rotates_residual:
        outer["the same, rotated"] = run.shape.outer_parameters * run.stored.itemsize
    block = {"a finished block, as it is written": 2 * run.packed_block}
    if run.is_on_host:
        block |= _states(run) | {"outputs of attention and MLP": _outputs_of_children(run)}
        block |= {"tokens that experts read": max(_read_by_experts(run, site) for site in run.shape.fullest)}
    stages = [Stage("embedding and head", process | outer), Stage("blocks", _named(process | block))]
    if run.shape.head is not None:
        stages.append(Stage(HEAD, process | outer | coded_terms(run)))
    if run.spread is not None:
        waiting = run.spread.bytes_in("main memory")
        read = max(run.spread.sizes.blocks)
        written = {"blocks of the original model": waiting, "a block, as it is read": read}
        stages.insert(0, Stage(WRITING, _named(process | written)))
    return MemoryEstimate(tuple(stages))


def _read_by_experts(run: Run, here: SiteShape) -> float:
    """The bytes of the tokens of all experts of a block, if statistics are taken of each expert's tokens."""
    recipe = run.recipe
    looks = recipe.smoothing is not None or any(
        one.rounding.requirements.hessian or one.transform.needs for one in recipe.variants
    )
    streams = 2 if run.sees_original else 1
    return float(streams * run.stream_bytes) if here.site.is_of_experts and looks else 0.0


def _states(run: Run) -> dict[str, float]:
    """The memory between two blocks."""
    is_twice = run.recipe.looks_at_original and len(run.shape.blocks) > 1
    return {
        "hidden states": float(run.stream_bytes),
        "hidden states of the original": float(run.stream_bytes) if is_twice else 0.0,
    }


def _outputs_of_children(run: Run) -> float:
    """The outputs of all submodules with sites of a block, once the block is done."""
    children = len({site.child for site in run.shape.fullest})
    return float(children * (2 if run.sees_original else 1) * run.stream_bytes)


def _named(terms: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in terms.items() if value}


def _loading(run: Run) -> list[Stage]:
    terms = {"embedding, last norm and head": float(run.shape.outer_parameters * run.itemsize)}
    if not run.is_gpu:
        terms["the same, as they are read"] = run.shape.outer_parameters * run.stored.itemsize
    found = [Stage("loading", terms | merged_rotations(run))]
    if run.rotates_residual:
        rows = min(ROWS, run.shape.vocabulary)
        found.append(
            Stage(
                "rotating embedding and head",
                merged_rotations(run)
                | {
                    "some of their rows in float64": 16.0 * rows * run.shape.hidden,
                    "both as they are read, and rotated": 0.0
                    if run.is_gpu
                    else 2.0 * run.shape.outer_parameters * run.stored.itemsize,
                },
            )
        )
    return found


def _rotating(run: Run) -> list[Stage]:
    """The stages of reading a block and rotating its weights."""
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


def _resident(run: Run, position: int) -> dict[str, float]:
    """The tensors that are alive during all of site `position`, except those kept by passes."""
    shape, recipe, s = run.shape, run.recipe, run.itemsize
    sites = shape.fullest
    weights = sum(site.weights for site in sites)
    # A GPU computes in the type that was read, with the same tensors.
    read = shape.block_parameters - (0 if run.is_gpu else _smoothed(run))
    stays = run.keeps_model or recipe.tunes_network
    terms = {
        "embedding, last norm and head": float(shape.outer_parameters * s) if stays else 0.0,
        **merged_rotations(run),
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
    if stays:
        terms["finished blocks"] = run.packed_block * (len(shape.blocks) - 1)
    if recipe.keeps_remainders:
        kept = shape.quantized_weights - weights if recipe.tunes_network else 0
        own = sum(site.weights for site in sites[:position])
        terms["what rounding took away"] = 2.0 * (kept + own)
    return terms


def _smoothed(run: Run) -> int:
    """The number of weights of a block in float64, because smoothing scales are merged into them."""
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
    """The data that passes over the calibration windows keep for later passes."""
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
        OF_EXPERT: here.share * read,
        "outputs of attention and MLP": 0.0 if run.is_on_host else float(of_children * run.stream_bytes),
        "outputs of the norm": float(of_norm),
        INPUTS: _kept_inputs(run, here, ends) if requirements.hessian or here.transform.needs else 0.0,
    }


def _kept_inputs(run: Run, here: SiteShape, ends: bool) -> float:
    """The bytes of a site's inputs that are kept from one pass to the next."""
    whole = here.share * run.tokens * here.inputs * run.itemsize
    requirements = here.recipe.rounding.requirements
    kept = beside = 0.0
    if requirements.hessian:
        beside = float(run.stream_bytes) if reads_residual(run, here) else 0.0
        share = keeps_share(run, here)
        kept, beside = share * whole, share * beside
        if run.shape.fullest[0].child == here.child:
            beside = 0.0  # for the first child it is the hidden states
    if here.site.norm is not None:
        kept = 0.0  # the outputs of the norm
    elif ends and len(here.rows) == 1:
        kept = max(kept, min(whole, run.remembered))
    return kept + beside


def _block_end(run: Run) -> list[Stage]:
    """The stage in which the block's outputs become the next block's inputs."""
    if not run.tokens:
        return []
    last = len(run.shape.fullest) - 1
    base = _resident(run, last)
    known = {"outputs of attention and MLP": 0.0 if run.is_on_host else _outputs_of_children(run)}
    stages = [Stage("the block's outputs", base | known | {"one batch": forward_bytes(run, last)})]
    if tuned := block_tuning_terms(run):
        stages.append(Stage("tuning the block", base | known | tuned))
    return stages


def gigabytes(count: float) -> str:
    """Gigabytes in words, with three significant digits."""
    value = count / 1e9
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{min(digits, 3)}f} GB"
