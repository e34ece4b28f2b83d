"""The time that quantizing takes: the counted work divided by the speed of this machine."""

from __future__ import annotations

from dataclasses import dataclass

from mxrot.calibration.writing_sizes import WRITING
from mxrot.planning.choosing import choosing_work
from mxrot.planning.ordering import ordering_work
from mxrot.planning.rates import Rates
from mxrot.planning.refitting import is_refitted, refitting_work
from mxrot.planning.run import Run, fit_size, keeps_share, reads_residual
from mxrot.planning.shape import SiteShape
from mxrot.planning.training import trained_bytes, training_pieces
from mxrot.planning.tuning import tuning_texts_work, tuning_work
from mxrot.planning.writing import STREAMING, writing_work

DISK_BYTES = 1e9
"""The bytes per second of reading, hashing and writing files. Assumed, not measured."""
HOST_BYTES, TRAVERSALS = 2.5e10, 7
"""The bytes per second of hidden states between a GPU and main memory, and how often all hidden states of a model are
moved for each block. They explain the additional time of two shapes on an H200 (docs/plan.md)."""
STARTING_SECONDS = {"cpu": 0.0, "cuda": 6.0}
"""The time to open weights, load libraries and compile kernels if text is read. Also measured on an H200."""
OF_AN_EXPERT = 1100
"""Small operations for the statistics and the rounding of one expert's part of a site."""
ERROR_TOKENS = 512
MOMENT_CHANNELS = 512
OF_SITES = (
    *("passes over the calibration text", "statistics of the inputs", "transforms", "factors of the Hessians"),
    *("choices by site", "rounding", "refits of transforms"),
)
"""The work at each site of each block."""


class Work:
    """Amounts of work, by the name of their rate in `Rates`."""

    def __init__(self, **amounts: float) -> None:
        self.amounts = amounts

    def add(self, **amounts: float) -> None:
        """Add these amounts."""
        for name, amount in amounts.items():
            self.amounts[name] = self.amounts.get(name, 0.0) + amount

    def seconds(self, rates: Rates) -> float:
        return sum(amount / float(getattr(rates, name)) for name, amount in self.amounts.items())


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds by the name of the work."""

    terms: dict[str, float]
    rates: Rates

    @property
    def total(self) -> float:
        return sum(self.terms.values())


def estimate_seconds(run: Run, rates: Rates, building: float) -> TimeEstimate:
    """The time to quantize. `building` is the measured time in seconds for building the skeleton of the model."""
    works = {name: Work() for name in OF_SITES}
    for sites in run.shape.blocks:
        for position in range(len(sites)):
            for name, work in _site_work(run, sites, position).items():
                works[name].add(**work.amounts)
    works[WRITING] = Work(**writing_work(run, run.all_windows - run.windows, run.spread))
    works["tuning"] = Work(**tuning_work(run))
    works["writing text to tune on"] = Work()
    for amounts in tuning_texts_work(run):
        works["writing text to tune on"].add(**amounts)
    works["rotations"] = _rotations(run)
    works["training of rotations"] = _training(run)
    works["order of channels"] = Work(**ordering_work(run))
    terms = {name: work.seconds(rates) for name, work in works.items()}
    terms[STREAMING] = 0.0 if run.spread is None else run.spread.seconds_to_stream
    if run.recipe.choice is not None:
        terms["candidates"] = (1 + len(run.recipe.choice.candidates)) * sum(terms[name] for name in OF_SITES)
    terms["files"] = (run.shape.parameters * run.stored.itemsize * 1.3) / DISK_BYTES
    if run.is_gpu and run.tokens and run.is_on_host:
        streams = 2 if run.recipe.looks_at_original else 1
        terms["states to main memory and back"] = (
            TRAVERSALS * streams * len(run.shape.blocks) * run.stream_bytes / HOST_BYTES
        )
    terms["starting"] = building * (1 + run.recipe.runs_whole_original)
    if run.tokens:
        terms["starting"] += STARTING_SECONDS["cuda" if run.is_gpu else "cpu"]
    return TimeEstimate({name: value for name, value in terms.items() if value}, rates)


def _rotations(run: Run) -> Work:
    """The work of rotating the residual stream in all weights, each time they are read. Narrow heads are left out."""
    if not run.rotates_residual:
        return Work()
    shape, models = run.shape, 1 + run.recipe.runs_whole_original
    read = models * shape.linear_weights + (1 + models) * shape.outer_parameters
    return Work(float64=2.0 * shape.hidden * read, copy=24.0 * read)


def _training(run: Run) -> Work:
    """The work of training rotations: forward and backward passes, with recomputation, and rotated weights per step."""
    rotation, shape = run.recipe.rotation, run.shape
    if rotation is None or not run.recipe.trains_rotations:
        return Work()
    pieces, batch = training_pieces(run), min(rotation.batch_windows, max(1, run.windows))
    passes, tokens = -(-batch // pieces.windows), batch * run.seq_len
    weights, times = shape.linear_weights, 3 + pieces.recompute
    kept = sum(trained_bytes(run, sites) for sites in shape.blocks)
    # The widths of heads are left out; weights are rotated in float32, at about the rate of float64.
    rotated = times * passes * weights * shape.hidden + 20.0 * shape.hidden**3
    work = Work(product=2.0 * times * tokens * shape.active_parameters, float64=2.0 * rotated)
    work.add(copy=passes * 60.0 * weights + 10.0 * tokens * kept + 30.0 * tokens * shape.vocabulary)
    work.add(quantized=2.0 * tokens * sum(site.inputs for sites in shape.blocks for site in sites))
    work.add(operations=300.0 * times * passes * len(shape.blocks))
    return Work(**{name: rotation.steps * amount for name, amount in work.amounts.items()})


def _site_work(run: Run, sites: tuple[SiteShape, ...], position: int) -> dict[str, Work]:
    """The work at one site of one block."""
    here, recipe = sites[position], sites[position].recipe
    n, k, tokens = here.outputs, here.inputs, run.tokens
    requirements = recipe.rounding.requirements
    found = {
        "transforms": _transform(run, here),
        "rounding": Work(encoded=1.6 * n * k, copy=50.0 * n * k, operations=_rounding_operations(here)),
    }
    if tokens:
        found["passes over the calibration text"] = _passes(run, sites, position)
        found["statistics of the inputs"] = _statistics(run, here)
        found["rounding"].add(float64=2.0 * ERROR_TOKENS * n * k, product=2.0 * ERROR_TOKENS * n * k)
    if requirements.hessian:
        factors = (2 if here.follows_original else 1) * here.experts
        amounts = {"factor": float(factors * k**3), "columns": float(factors * k)}
        found["factors of the Hessians"] = Work(**amounts, operations=30.0 * factors)
        candidates = recipe.rounding.candidates
        steps = here.experts * k // (recipe.weights.quantizer().format.block or k)
        found["rounding"].add(
            rounded=float(n * k * candidates),
            block_steps=float(steps),
            operations=6.0 * steps,
            # Spreading rounding errors; the regression towards the target.
            float64=n * float(k * k) * (5.0 if here.follows_original else 1.0),
        )
        found["choices by site"] = Work(**choosing_work(run, here))
    if is_refitted(here):
        found["refits of transforms"] = Work(**refitting_work(run, here))
        found["refits of transforms"].add(**_second_moments(run, here, 1).amounts)
    return found


def _rounding_operations(here: SiteShape) -> float:
    return 60.0 * len(here.rows) + (300.0 if here.experts == 1 else OF_AN_EXPERT * here.experts)


def _transform(run: Run, here: SiteShape) -> Work:
    """The work of fitting a transform and folding it into the weights."""
    if not here.scheme.stages:
        return Work()
    n, k, method = here.outputs, here.inputs, here.transform
    mixed = sum(stage.multiple for stage in here.scheme.stages)
    work = Work(copy=48.0 * n * k, float64=2.0 * n * k * mixed, operations=100)
    amounts = method.fitting_work(fit_size(run, here))
    work.add(**{name: here.transforms * amount for name, amount in amounts.items()})
    return work


def _passes(run: Run, sites: tuple[SiteShape, ...], position: int) -> Work:
    """The work of passes over the calibration windows: products of this site's linears, and operations around them."""
    here, recipe, s = sites[position], run.recipe, run.itemsize
    n, k, tokens = here.outputs, here.inputs, here.share * run.tokens
    batches = run.tokens / run.batch_tokens
    later = [site for site in sites[position + 1 :] if site.child == here.child]
    again = sum(1 - keeps_share(run, site) for site in later) if here.recipe.rounding.requirements.hessian else 0.0
    refits = sum(is_refitted(site) for site in later)
    quantized = 1 + again + refits  # passes with this site quantized
    plain = (1.0 + refits if recipe.looks_at_original else 0.0) + (1.0 if recipe.smoothing is not None else 0.0)
    work = Work(product=2.0 * tokens * n * k * (quantized + plain))
    work.add(quantized=quantized * tokens * k * len(here.rows))
    work.add(copy=(quantized * 10 + plain * 6) * tokens * n * s)
    work.add(copy=quantized * batches * n * k * (8 if run.is_gpu else 24))  # weights, written out
    if position == 0:  # attention between its linears, causal: half of all pairs
        work.add(product=2 * 2.0 * tokens * run.seq_len * run.shape.query_width * (quantized + plain))
        work.add(copy=24.0 * tokens * n * s * (quantized + plain))
        # Scores are read and written in each of the steps between the two products.
        work.add(copy=tokens * run.token_scores * (12.0 * s + 8) * (quantized + plain))
        work.add(quantized=tokens * run.rounded_in_attention * (quantized + plain))
    work.add(copy=20.0 * run.tokens * run.shape.hidden * s * (1 + bool(recipe.looks_at_original)))
    work.add(operations=40 * here.experts * batches * (quantized + plain))
    return work


def _statistics(run: Run, here: SiteShape) -> Work:
    """The work for statistics that transforms are fitted to, Hessians, and shifts towards the target."""
    transform, k = here.transform, here.inputs
    tokens = here.experts * here.share * run.fitted_tokens
    batches = here.experts * run.tokens / run.batch_tokens
    work = Work(operations=30 * batches)
    if "moments" in transform.needs:
        work.add(product=2.0 * tokens * k * (MOMENT_CHANNELS if run.is_gpu else 4 * transform.block))
    if "whole" in transform.needs:
        work.add(product=2.0 * tokens * k * k, copy=40.0 * batches * k * k)
    if transform.needs:
        work.add(copy=3.0 * tokens * k * run.itemsize)
    if here.recipe.rounding.requirements.hessian:
        work.add(**_second_moments(run, here, len(run.groups)).amounts)
    return work


def _second_moments(run: Run, here: SiteShape, groups: int) -> Work:
    """The work for Hessians, and shifts towards the target, of this number of groups, together all windows."""
    requirements, n, k = here.recipe.rounding.requirements, here.rounded, here.inputs
    tokens = here.experts * here.share * run.tokens
    batches = here.experts * run.tokens / run.batch_tokens
    scaled = requirements.relative and here.site.residual is not None
    parts = 2 if (scaled or requirements.inputs == "unquantized") and run.is_gpu else 1
    work = Work(quantized=tokens * k, product=2.0 * parts * tokens * k * k)
    work.add(copy=40.0 * batches * k * k + 8.0 * tokens * k)
    if not here.follows_original:
        return work
    if reads_residual(run, here):
        work.add(product=2.0 * tokens * n * k * (1 + (2 if run.is_gpu else 1)), operations=30 * batches)
        work.add(copy=40.0 * tokens * n + 40.0 * batches * n * k)
    else:
        work.add(product=2.0 * tokens * k * k, copy=40.0 * batches * k * k)
    # The site's own output in a shift, and that of the original if it comes from moments.
    work.add(float64=(2.0 if reads_residual(run, here) else 4.0) * groups * n * k * k)
    return work
