"""The memory and the work of finding orders of channels. They follow quantizing/permuting.py."""

from __future__ import annotations

from mxrot.planning.run import Run
from mxrot.planning.shape import SiteShape
from mxrot.planning.stage import Stage
from mxrot.transforms.channel_order import LOOK_BYTES, ORDER_BYTES, ROUNDS, at_once, looked_at

TAKEN_TOGETHER = 32.0
"""The bytes per pair of channels while moments are concatenated for orders that are found together."""
EXCHANGE_BYTES = 100.0
"""The bytes that a round of exchanges reads and writes per pair with a candidate channel."""
DEALING = 13
"""Small operations per channel that is dealt to a block."""
OF_AN_EXPERT = 1500
"""Small operations for the moments of one expert."""
LAUNCHED, OF_EACH = 45, 15
"""Small operations of a round, for all orders that are found together and for each of them."""
TRACING = 40
"""Small operations on a CPU for the trace of one block."""


def ordered_sites(run: Run, sites: tuple[SiteShape, ...]) -> list[tuple[SiteShape, str, int]]:
    """The sites of a block with ordered channels, each with the kind of order and the channels ordered at once."""
    wanted = run.recipe.permutation
    if wanted is None:
        return []
    found = []
    for here in sites:
        if here.site.producer_is_value or here.site.name == "o":
            found.append((here, wanted.value_heads, run.shape.head_width))
        elif here.site.group == "down":
            found.append((here, wanted.ffn, here.inputs))
    return [(here, kind, width) for here, kind, width in found if kind != "none"]


def ordering_stages(run: Run) -> list[Stage]:
    """The stages of memory. Empty if channels are not reordered."""
    shape = run.shape
    found = ordered_sites(run, shape.fullest)
    if not found:
        return []
    base = {
        "embedding, last norm and head": float(shape.outer_parameters * run.itemsize),
        "rotations": float(run.rotation_bytes),
        "hidden states": 0.0 if run.is_on_host else float(run.fitted_tokens * shape.hidden * run.itemsize),
        "masks": float(run.mask_bytes),
        "the block as it was read": float(shape.block_parameters * run.stored.itemsize),
        "the block in float32": 0.0 if run.is_gpu else 4.0 * shape.block_parameters,
    }
    stages = []
    for here, kind, width in found:
        whole = 8.0 * here.inputs**2  # of inputs, and the same again of weights
        order = ORDER_BYTES[kind] * width**2 + (LOOK_BYTES * looked_at(width) * width if kind == "correlated" else 0.0)
        together = min(at_once(here.inputs // width, width), len(shape.blocks) * here.experts)
        order = order if together == 1 else together * max(order, TAKEN_TOGETHER * width**2)
        pairs = max(order + (2 * whole if here.inputs > width else 0.0), 3 * whole)
        weights = 8.0 * here.rounded * here.inputs
        stages.append(Stage(f"{here.site.name}: order of channels", base | {"pairs of channels": max(pairs, weights)}))
    return stages


def ordering_work(run: Run) -> dict[str, float]:
    """The amounts of work, by the name of their rate: a pass, moments, and rounds of exchanges."""
    found: dict[str, float] = {}
    for sites in run.shape.blocks:
        chosen = ordered_sites(run, sites)
        if not chosen:
            continue
        weights = sum(site.share * site.weights for site in sites)
        amounts = {"product": 2.0 * run.fitted_tokens * weights, "operations": 0.0, "copy": 0.0, "float64": 0.0}
        for here, kind, width in chosen:
            k, experts, parts = here.inputs, here.experts, max(1, here.inputs // width)
            together = min(at_once(parts, width), len(run.shape.blocks) * experts)
            amounts["product"] += 2.0 * run.fitted_tokens * here.share * experts * k**2
            each = 200.0 if experts == 1 else OF_AN_EXPERT
            amounts["operations"] += experts * (each + DEALING * k / together)
            amounts["float64"] += 2.0 * experts * here.rounded * k**2
            if kind == "correlated":
                block = here.recipe.transform.block_in(k)
                amounts["copy"] += EXCHANGE_BYTES * ROUNDS * experts * k * looked_at(width)
                traces = 0.0 if run.is_gpu else TRACING * k / block
                amounts["operations"] += ROUNDS * experts * (LAUNCHED * parts / together + OF_EACH * parts + traces)
                # The gains of channels: in float32, twice as fast.
                amounts["float64"] += ROUNDS * experts * parts * width**3 / block
        for name, amount in amounts.items():
            found[name] = found.get(name, 0.0) + amount
    return found
