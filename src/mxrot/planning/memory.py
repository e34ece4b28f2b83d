"""How much memory quantizing takes, stage by stage: counted from what the pipeline holds.

A stage is a moment at which many tensors are alive; the peak is the largest of them. Each term of a stage has a name,
so that a plan can say what fills the memory, and what to change. Where the code keeps what fits below a bound (a
norm's outputs, a site's inputs), so does this.

The formulas follow quantizing/, calibration/, rounding/gptq.py and tuning/; tests compare them with the tensors that
are really alive during a run. What is not counted: workspaces of matrix libraries and what an allocator loses between
tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mxrot.calibration.generation import SEQUENCE_TOKENS, cache_bytes, sequences_within
from mxrot.calibration.placement import MOST_ON_DEVICE, MOST_REMEMBERED
from mxrot.kernels.chunked import CHUNK_ELEMENTS
from mxrot.kernels.plain.moments import LEAST_CHUNK, MOST_PARTIAL
from mxrot.planning.shape import ModelShape, SiteShape
from mxrot.quantizing.run import tokens_at_once
from mxrot.recipe import Recipe
from mxrot.transforms import FitSize
from mxrot.tuning.network import CHECKPOINT_BYTES, LOGIT_TOKENS

PROCESS_BYTES = {"cpu": 5e8, "cuda": 3e9}
"""Of main memory: the code of PyTorch and transformers (measured on Linux); with a GPU also its driver and libraries
(assumed)."""
KEPT_SHARE, MOST_KEPT = 0.45, 2.5e8
"""What the allocator holds back within a site (heap.py), relative to the tensors alive, and at most: glibc maps tensors
of more than 32 MiB one by one. Both were measured on Linux."""
ENCODING = 7
"""float64 and int64 numbers a weight while it becomes a code (formats/element.py)."""
FACTORING = 5
"""Matrices of the Hessian's size while it is factorized, besides the Hessian itself (rounding/linalg.py)."""
CODED_BYTES = 1 + 1 / 32
"""A rounded weight before it is packed: its code and its part of a scale."""
TUNED_BYTES = 28.2
"""A tunable weight, besides its code and scale: value and two distances, what rounding took away (2 each), offset, its
gradient, two averages of Adam, the best so far (4 each), and the moved weight."""


@dataclass(frozen=True)
class Stage:
    """What is alive at one moment."""

    name: str
    terms: dict[str, float]
    """Bytes, by what they are for."""

    @property
    def total(self) -> float:
        return sum(self.terms.values())


@dataclass(frozen=True)
class MemoryEstimate:
    """The stages of a run, in the order in which they come."""

    stages: tuple[Stage, ...]

    @property
    def peak(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.total)


@dataclass(frozen=True)
class Run:
    """One way to quantize a model: what the estimates depend on."""

    shape: ModelShape
    recipe: Recipe
    device: str
    """"cpu" or "cuda"."""
    stored: torch.dtype
    """The model's own type."""
    windows: int
    """Calibration windows of the text."""
    seq_len: int
    keeps_model: bool = False
    """In memory, for `compare`, instead of being written to a folder block by block."""

    @property
    def itemsize(self) -> int:
        """Bytes of a number that the model computes with."""
        return 4 if self.device == "cpu" else self.stored.itemsize

    @property
    def is_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def all_windows(self) -> int:
        """With those that the model writes."""
        if self.recipe.is_data_free:
            return 0
        written = self.recipe.calibration.generated * self.windows
        return self.windows + (max(1, round(written)) if written else 0)

    @property
    def tokens(self) -> int:
        return self.all_windows * self.seq_len

    @property
    def batch_tokens(self) -> int:
        """Tokens that pass through a block together."""
        widest = max(self.shape.widest, self.token_scores)
        return min(self.tokens, max(1, tokens_at_once(widest, self.device) // self.seq_len) * self.seq_len)

    @property
    def token_scores(self) -> int:
        """Scores that attention writes out for a token."""
        return self.shape.score_heads * self.seq_len

    @property
    def mask_bytes(self) -> int:
        """Masks that blocks are called with: none where attention is plainly causal, one for each kind of blocks."""
        config = self.shape.config
        kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
        if not self.shape.score_heads:
            is_short = self.seq_len <= (getattr(config, "sliding_window", None) or self.seq_len)
            return 0 if is_short else self.seq_len**2
        return len(kinds) * self.itemsize * self.seq_len**2

    @property
    def remembered(self) -> int:
        return MOST_REMEMBERED["cuda" if self.is_gpu else "cpu"]

    @property
    def stream_bytes(self) -> int:
        """The states between two blocks, of all tokens."""
        return self.tokens * self.shape.hidden * self.itemsize

    @property
    def is_on_host(self) -> bool:
        """Do the states between blocks, and the outputs of attention and MLP, wait in main memory beside a GPU?"""
        return self.is_gpu and self.stream_bytes > MOST_ON_DEVICE["cuda"]

    @property
    def model_bytes(self) -> float:
        """The original model."""
        return float(self.shape.parameters * self.itemsize)

    @property
    def packed_block(self) -> float:
        """A quantized block."""
        after = self.shape.size_after(self.stored)
        inside = after.code_bytes + after.scale_bytes + after.transform_bytes
        return inside / max(1, len(self.shape.blocks))

    @property
    def sees_original(self) -> bool:
        """Does rounding look at the original block's inputs?"""
        return self.recipe.rounding.requirements.target != "own"


def estimate_memory(run: Run) -> MemoryEstimate:
    """Of the device that computes: main memory on a CPU, the GPU's own on a GPU."""
    process = {} if run.is_gpu else {"the process": PROCESS_BYTES["cpu"]}
    stages = [*_loading(run), *_writing_text(run)]
    for position, _ in enumerate(run.shape.fullest):
        stages += _site_stages(run, position)
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
    block = {"a finished block, as it is written": 2 * run.packed_block}
    if run.is_on_host:
        block |= _states(run) | {"outputs of attention and MLP": _outputs_of_children(run)}
        block |= {"tokens that experts read": max(_read_by_experts(run, site) for site in run.shape.fullest)}
    return MemoryEstimate((Stage("embedding and head", process | outer), Stage("blocks", _named(process | block))))


def _read_by_experts(run: Run, here: SiteShape) -> float:
    """Bytes of the tokens of all experts of a block, where statistics are taken of what each of them gets."""
    recipe = run.recipe
    looks = recipe.rounding.requirements.hessian or bool(recipe.transform.needs) or recipe.smoothing is not None
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
    return [Stage("loading", terms)]


def _writing_text(run: Run) -> list[Stage]:
    generated = run.recipe.calibration.generated
    if not generated or run.recipe.is_data_free:
        return []
    written = (run.all_windows - run.windows) * run.seq_len
    original = {"the original model": run.model_bytes}
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
    terms = {
        "embedding, last norm and head": float(shape.outer_parameters * s),
        **({} if run.is_on_host else _states(run)),
        "masks": float(run.mask_bytes if run.tokens else 0),
        "the block as it was read": float(shape.block_parameters * run.stored.itemsize),
        "the block in float64": 8.0 * weights,
        "the block of the original": float(shape.block_parameters * s) if recipe.looks_at_original else 0.0,
    }
    if not run.is_gpu:  # a GPU computes in the type that was read, with the very same tensors
        left = shape.block_parameters - sum(site.weights for site in sites[:position])
        terms["the block in float32"] = 4.0 * left
    terms["the quantized block"] = run.packed_block * sum(site.weights for site in sites[:position]) / max(1, weights)
    if run.keeps_model or recipe.tunes_network:
        terms["finished blocks"] = run.packed_block * (len(shape.blocks) - 1)
    if recipe.tuning is not None:
        kept = shape.quantized_weights - weights if recipe.tunes_network else 0
        own = sum(site.weights for site in sites[:position])
        terms["what rounding took away"] = 2.0 * (kept + own)
    return terms


def _remembered(run: Run, position: int) -> dict[str, float]:
    """What passes over the calibration windows have left for later ones."""
    if not run.tokens:
        return {}
    sites, here = run.shape.fullest, run.shape.fullest[position]
    streams = 2 if run.sees_original else 1
    requirements = run.recipe.rounding.requirements
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
        if requirements.hessian or run.recipe.transform.needs
        else 0.0,
    }


def _kept_inputs(run: Run, here: SiteShape, ends: bool) -> float:
    """Bytes of what goes into a site, as far as they are kept from one pass to the next."""
    whole = here.share * run.tokens * here.inputs * run.itemsize
    requirements = run.recipe.rounding.requirements
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


def keeps_share(run: Run, here: SiteShape) -> float:
    """The share of a site's inputs that are kept for the pass that its Hessian is taken from."""
    beside = run.stream_bytes if reads_residual(run, here) else 0
    return min(1.0, run.remembered / max(1, here.share * run.tokens * here.inputs * run.itemsize + beside))


def reads_residual(run: Run, here: SiteShape) -> bool:
    """Does rounding look at the residual stream that a site's output is added to?"""
    requirements = run.recipe.rounding.requirements
    return here.site.residual is not None and (requirements.relative or requirements.target == "residual")


def _forward(run: Run, position: int) -> float:
    """Bytes at the height of a pass of one batch up to site `position`."""
    sites, here = run.shape.fullest, run.shape.fullest[position]
    b, s = run.batch_tokens, run.itemsize
    before = [site for site in sites[:position] if site.child == here.child]
    made = sum(site.share * site.rounded for site in before)
    quantizing = _quantizing(run, max((site.inputs for site in before), default=0))
    # A norm computes in float32; a product of quantized inputs is float32 before it is `s` bytes wide.
    norm = b * run.shape.hidden * (s + 8.0)
    is_attention = run.shape.fullest[0].child == here.child
    # Scores, and what they become: probabilities in float32.
    scores = b * run.token_scores * (s + 4.0) if is_attention and before else 0.0
    return max(norm, quantizing + b * made * (5.0 * s if is_attention else (4.0 if run.is_gpu else 6.0)) + scores)


def _quantizing(run: Run, channels: int) -> float:
    """Bytes that quantizing inputs takes on a CPU, a piece after the other; one kernel on a GPU."""
    return 0.0 if run.is_gpu else 14.0 * min(run.batch_tokens * channels, CHUNK_ELEMENTS)


def _moment(run: Run, n: int, m: int, is_scaled: bool) -> float:
    """Bytes of a second moment [n, m] of one batch: parts of its operands, products, and their sums."""
    b = run.batch_tokens
    if not run.is_gpu:
        return 12.0 * n * m + (4.0 * b * n if is_scaled else 0.0)
    wide = 2 * n if is_scaled else n
    count = 1
    while b // (2 * count) >= LEAST_CHUNK and 2 * count * wide * m <= MOST_PARTIAL:
        count *= 2
    return (2.0 * b * wide if is_scaled else 0.0) + max(4.0 * count * wide * m + 4.0 * n * m, 12.0 * n * m)


def _site_stages(run: Run, position: int) -> list[Stage]:
    """The stages of one site."""
    here, recipe = run.shape.fullest[position], run.recipe
    requirements = recipe.rounding.requirements
    n, k = here.rounded, here.inputs
    u, h = 8.0 * n * k, 8.0 * k * k
    base = _resident(run, position) | _remembered(run, position)
    name = here.site.name
    folded = u if recipe.has_transform else 0.0
    stages = []
    if run.tokens:
        stages.append(Stage(f"{name}: collecting", base | {"one batch": _forward(run, position)}))
    if recipe.has_transform:
        weights, of_fit = 16.0 * here.weights / here.transforms, run.recipe.transform.fitting_bytes(fit_size(run, here))
        stages.append(Stage(f"{name}: fitting", base | {"fitting the transform": weights + of_fit}))
    if here.transforms < here.experts:
        base["rounded weights of the other experts"] = CODED_BYTES * (here.weights - n * k)
    matrices = 0.0
    shift = u if run.sees_original else 0.0
    if requirements.hessian:
        stages.append(Stage(f"{name}: statistics", base | _statistics(run, position)))
        weights = folded + 2 * u + shift
        factoring = {"the Hessian and its factor": (1 + FACTORING) * h, "weights while they are rounded": weights}
        stages.append(Stage(f"{name}: factorizing", base | factoring))
        matrices = (3 if run.sees_original else 2) * h
    # Weights, what they are rounded to and what that took away, and the numbers on the way to codes.
    kept = (4 if requirements.hessian else 1) * u + shift + folded
    rounding = {"the Hessian and its factor": matrices, "weights while they are rounded": kept + ENCODING * u}
    stages.append(Stage(f"{name}: rounding", base | rounding))
    return stages


def fit_size(run: Run, here: SiteShape) -> FitSize:
    """What one transform of a site is fitted to; on a GPU the fits of all sites are recorded."""
    recorded = tuple(site.inputs for site in run.shape.fullest) if run.is_gpu else ()
    return FitSize(here.outputs // here.transforms, here.inputs, run.recipe.sharing, run.tokens, recorded)


def _statistics(run: Run, position: int) -> dict[str, float]:
    """The Hessian of a site and the shift towards its target.

    What a batch leaves is alive while the next one passes through the block, if it does: where inputs were kept, none
    has to.
    """
    here = run.shape.fullest[position]
    requirements = run.recipe.rounding.requirements
    n, k, b = here.rounded, here.inputs, math.ceil(here.share * run.batch_tokens)
    u, h = 8.0 * n * k, 8.0 * k * k
    is_residual = reads_residual(run, here)
    is_relative = requirements.relative and here.site.residual is not None
    of_hessian = _moment(run, k, k, is_relative)
    left = b * k * (2.0 if run.is_gpu else 4.0)  # what the site sees: transformed and quantized
    weights = u + (u if run.recipe.has_transform else 0.0)
    if is_residual:
        weights += (2.0 if run.is_gpu else 4.0) * n * k
    if not run.sees_original:
        left += 4.0 * b * n if is_residual else 0.0
        totals, temporary, ending = h, of_hessian, h
    else:
        weights += u
        left += b * k * run.itemsize
        if is_residual:
            left += 12.0 * b * n  # the output that is wanted, the stream with it, and what is missing there
            of_shift = _moment(run, n, k, True) + (0.0 if run.is_gpu else 4.0 * b * k)
            totals, temporary, ending = h + u, max(of_hessian, of_shift), h + 3 * u
        else:
            totals, temporary, ending = 2 * h, max(of_hessian, _moment(run, k, k, False)), 2 * h + 3 * u
    runs_again = run.sees_original or keeps_share(run, here) < 1
    others = here.share * run.tokens - b
    forward = _forward(run, position) * min(1.0, others / b) if runs_again else 0.0
    during = left + max(temporary, forward, _quantizing(run, k))
    return {
        "one batch": left if ending > during else during,
        "sums over all batches": totals + (ending - left if ending > during else 0.0),
        "weights while they are rounded": weights,
    }


def _block_end(run: Run) -> list[Stage]:
    """The block's outputs become the next one's inputs."""
    if not run.tokens:
        return []
    last = len(run.shape.fullest) - 1
    base = _resident(run, last)
    known = {"outputs of attention and MLP": 0.0 if run.is_on_host else _outputs_of_children(run)}
    stages = [Stage("the block's outputs", base | known | {"one batch": _forward(run, last)})]
    options = run.recipe.tuning
    if options is not None and options.scope == "block":
        weights = sum(site.weights for site in run.shape.fullest)
        tokens = options.batch_windows * run.seq_len
        tuned = {
            "tunable weights": TUNED_BYTES * weights,
            "activations": tokens * activation_bytes(run, run.shape.fullest),
        }
        stages.append(Stage("tuning the block", base | known | tuned))
    return stages


def activation_bytes(run: Run, sites: tuple[SiteShape, ...]) -> float:
    """What a backward pass keeps of one token in one block, as tuning/network.py has it."""
    return 8.0 * (sum(rows + site.inputs for site in sites for rows in site.rows) + run.token_scores)


def _tuning(run: Run) -> list[Stage]:
    """Distillation of the whole network."""
    options, shape = run.recipe.tuning, run.shape
    if options is None or not run.recipe.tunes_network:
        return []
    blocks, weights = len(shape.blocks), shape.quantized_weights
    original = {"the original model": float(shape.parameters * run.itemsize)}
    packed = {"the quantized model": blocks * run.packed_block + shape.outer_parameters * run.itemsize}
    stages = []
    if options.generated:
        written = max(1, round(options.generated * run.windows)) * run.seq_len
        kept = {"what rounding took away": 2.0 * weights}
        stages.append(Stage("writing text to tune on", original | packed | kept | _generation(run, written)))
    tokens = options.batch_windows * run.seq_len
    activations = tokens * sum(activation_bytes(run, sites) for sites in shape.blocks)
    if activations > CHECKPOINT_BYTES:
        activations = tokens * (activation_bytes(run, shape.fullest) + 4.0 * shape.hidden * blocks)
    wide = {"embedding, last norm and head in float32": 4.0 * shape.outer_parameters}
    is_bounded = getattr(shape.config, "final_logit_softcapping", None) is not None
    logits = min(tokens, LOGIT_TOKENS) * shape.vocabulary * (12.0 if is_bounded else 10.0)
    tuned = {
        "tunable weights": TUNED_BYTES * weights,
        "activations": activations + 8.0 * tokens * shape.hidden,
        "logits": logits,
    }
    stages.append(Stage("tuning", original | packed | wide | tuned))
    return stages


def gigabytes(count: float) -> str:
    """Bytes for people: three digits that count."""
    value = count / 1e9
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{min(digits, 3)}f} GB"
