"""The part of one process in a shared run, as in quantizing/shared.py. Windows, rows of a site, whole experts, orders
of channels and batches of tuning are divided equally. All other work is done in each process."""

from __future__ import annotations

from dataclasses import replace

from mxrot.calibration.writing_sizes import WRITING
from mxrot.planning.memory import INPUTS, OF_EXPERT, MemoryEstimate
from mxrot.planning.rates import Rates
from mxrot.planning.run import Run
from mxrot.planning.seconds import TimeEstimate, estimate_seconds
from mxrot.planning.stage import Stage
from mxrot.planning.tuning import gradient_bytes
from mxrot.planning.writing import STREAMING

EXCHANGED_BYTES = {"cpu": 2e9, "cuda": 1e11}
"""The bytes per second of exchanging statistics between processes, over loopback and over NVLink. Assumed, not
measured."""
OF_THE_FIRST = (WRITING, STREAMING, "writing text to tune on")
"""The work that the first process does for all."""


def share_of(run: Run, processes: int) -> Run:
    """The run with the largest share of the windows, and of a batch of tuning."""
    recipe, calibration, tuning = run.recipe, run.recipe.calibration, run.recipe.tuning
    own = replace(calibration, own=_share(calibration.own, processes))
    if tuning is not None:
        tuning = replace(tuning, batch_windows=_share(tuning.batch_windows, processes))
    recipe = replace(recipe, calibration=own, tuning=tuning)
    return replace(run, windows=_share(run.windows, processes), recipe=recipe)


def shared_memory(of_share: MemoryEstimate, of_all: MemoryEstimate) -> MemoryEstimate:
    """The memory of the first process, which writes the text for all: the stages of its share, and those of writing.
    For an expert, it receives the tokens of all processes."""
    written = {stage.name: stage for stage in of_all.stages if stage.name.startswith("writing")}
    whole = {stage.name: stage for stage in of_all.stages}
    return MemoryEstimate(
        tuple(written.get(stage.name, _handed(stage, whole.get(stage.name, stage))) for stage in of_share.stages)
    )


def _handed(of_share: Stage, of_all: Stage) -> Stage:
    """The memory for one expert, with one expert per process: all processes' data for it, beside this process's data
    for each."""
    if OF_EXPERT not in of_all.terms or of_share.terms == of_all.terms:
        return of_share
    handed = {name: of_all.terms[name] for name in (OF_EXPERT, INPUTS) if name in of_all.terms}
    handed[OF_EXPERT] *= 2
    return Stage(of_share.name, of_share.terms | handed)


def shared_seconds(run: Run, processes: int, rates: Rates, building: float) -> TimeEstimate:
    """The time of all processes together, or of the single one."""
    whole = estimate_seconds(run, rates, building)
    if processes == 1:
        return whole
    terms = estimate_seconds(share_of(run, processes), rates, building).terms
    terms |= {name: whole.terms[name] for name in OF_THE_FIRST if name in whole.terms}
    if "rounding" in terms:
        terms["rounding"] /= processes
    if "order of channels" in terms:
        terms["order of channels"] = whole.terms["order of channels"] / processes
    if "choices by site" in terms:
        tried = max(1, run.recipe.rounding.tried_dampings * run.kinds)  # each fold and candidate, in some process
        terms["choices by site"] *= _share(tried, processes) / tried
    passed = 2 * (processes - 1) / processes * exchanged_bytes(run)
    return TimeEstimate(terms | {"exchange": passed / EXCHANGED_BYTES["cuda" if run.is_gpu else "cpu"]}, rates)


def exchanged_bytes(run: Run) -> float:
    """The exchanged bytes: statistics of all sites, in float64, the codes of rows, and in tuning the rounding errors
    and gradients."""
    found, groups = gradient_bytes(run), len(run.groups)
    found += 2.0 * run.shape.quantized_weights if run.recipe.keeps_remainders else 0.0
    for sites in run.shape.blocks:
        for here in sites:
            n, k = here.outputs, here.inputs
            shifts = here.rounded * k if here.follows_original else 0
            if here.recipe.rounding.requirements.hessian:
                found += 8.0 * here.experts * groups * (k * k + shifts)
            if here.transform.needs:
                found += 8.0 * k * here.transform.block
            found += here.recipe.weights.quantizer().format.bits_per_element * n * k / 8
    return found


def _share(count: int, processes: int) -> int:
    return -(-count // processes)
