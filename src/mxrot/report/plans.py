"""The output of a plan on the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from rich.table import Table

from mxrot.calibration.spreading import Place, Spread
from mxrot.layers.cache_size import CacheSize
from mxrot.models import Kept
from mxrot.planning import HOW, MemoryEstimate, Plan, Stage, gigabytes
from mxrot.report.vllm import vllm_lines

WIDTH = 120
"""The most columns of a long line."""
AT_TOKENS = 8192
"""The tokens of a cache whose size is shown, beside that at all positions."""
SHARE_SHOWN = 0.02
"""Terms below this share of their sum are summed up."""
NOT_SHOWN = 5e5
"""Bytes that would be printed as 0.000 GB."""


def plan_report(plan: Plan, columns: int = WIDTH) -> Iterator[Table | str]:
    """The tables and lines of a plan. Long lines are broken to fit this many columns, at most WIDTH."""
    width = min(columns, WIDTH)
    if plan.sizes is not None:
        yield _sites_table(plan)
        yield _size_lines(plan)
        for kept, blocks in plan.sizes.shape.kept:
            yield textwrap.fill(kept_line(kept, blocks), WIDTH, subsequent_indent="  ")
    if plan.recipe.rotation is not None:
        yield f"rotations, merged into the weights: {plan.recipe.rotation.spelled}"
    if plan.recipe.permutation is not None:
        yield f"permutations, merged into the weights: {plan.recipe.permutation.spelled}"
    if plan.recipe.attention is not None:
        yield f"operands of attention: {plan.recipe.attention.operands().spelled}"
    if plan.sizes is not None:
        yield cache_line(plan.sizes.cache)
    if plan.needs is not None:
        yield _memory_table(plan)
        if plan.processes > 1:
            yield f"memory is that of the first of {plan.processes} processes; main memory counts for each on a node"
        if plan.spread is not None:
            yield from (_filled(line, width) for line in _spread_lines(plan.spread))
        yield _disk_line(plan.needs.disk)
    if plan.time is not None:
        yield _time_table(plan)
        yield f"estimated by {HOW}"
    if plan.vllm is not None:
        for line in vllm_lines(plan.vllm):
            yield _filled(line, width)
    for warning in plan.warnings:
        yield f"warning: {warning}"
    for problem in plan.problems:
        yield f"refused: {problem}"
    if not plan.problems:
        yield "nothing would be refused"


def _filled(line: str, width: int) -> str:
    """The line, broken between words. Continued lines are indented by two more."""
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.fill(line, width, subsequent_indent=f"{indent}  ", break_long_words=False, break_on_hyphens=False)


def _sites_table(plan: Plan) -> Table:
    assert plan.sizes is not None
    table = Table(title=f"{plan.model} with {plan.recipe.name}", title_justify="left")
    is_mixture = bool(plan.recipe.override)
    words = ("site", "linears", *(("weights in, inputs in",) if is_mixture else ()))
    numbers = ("N x K", "blocks", "weights", *(("bits",) if is_mixture else ()))
    for heading in (*words, *numbers):
        table.add_column(heading, justify="left" if heading in words else "right")
    for found, count in plan.sizes.shape.site_counts():
        names = dict.fromkeys(name.rsplit(".", 1)[-1] for name in found.site.linears)  # one name for all experts
        shapes = [f"{rows} x {found.inputs}" for rows, _ in zip(found.rows, names, strict=False)]
        label = found.site.name + (f", {found.experts} experts" if found.experts > 1 else "")
        cells = ["\n".join(shapes), str(count), f"{count * found.weights / 1e6:,.1f} M"]
        if is_mixture:
            scheme = found.scheme
            inputs = "16 bit" if scheme.activations is None else scheme.activations.format.name
            cells = [f"{scheme.weights.format.name}, {inputs}", *cells, f"{found.size.bits_per_weight:.3f}"]
        table.add_row(label, "\n".join(names), *cells)
    after = plan.sizes.after
    if is_mixture and after.left_weights:
        bits = 8 * after.left_bytes / after.left_weights
        table.add_row("left", "", "as they are", "", "", f"{after.left_weights / 1e6:,.1f} M", f"{bits:.3f}")
    return table


def _size_lines(plan: Plan) -> str:
    assert plan.sizes is not None
    after = plan.sizes.after
    if after.bits_per_weight is None:
        return f"size: {gigabytes(plan.sizes.before)}; nothing would be quantized"
    transforms = "transforms without numbers" if plan.recipe.has_transform else "no transforms"
    if after.transform_bytes:
        transforms = f"transforms {after.transform_bits_per_weight:.2g} bits beside"
    weights = (after.quantized_weights + after.left_weights) / 1e9
    return (
        f"size: {gigabytes(plan.sizes.before)} before, {gigabytes(after.total_bytes)} after: "
        f"{weights:.3g} billion weights in {after.bits_per_weight:.3f} bits ({transforms}), "
        f"everything else {gigabytes(after.other_bytes)}"
    ) + _head_words(plan)


def _head_words(plan: Plan) -> str:
    """The share of a quantized head in everything else."""
    head = None if plan.sizes is None else plan.sizes.shape.head
    if head is None:
        return ""
    own = " and is no copy of the embedding any more" if plan.sizes is not None and plan.sizes.unties else ""
    return f", in which the head takes {gigabytes(head.coded_bytes)} ({head.scheme.spelled}){own}"


def kept_line(kept: Kept, blocks: int) -> str:
    """The parts that a family leaves unquantized in this many decoder blocks, and the reason."""
    where = "1 block" if blocks == 1 else f"{blocks} blocks"
    return f"kept as they are in {where}: {', '.join((*kept.linears, *kept.others))} ({kept.reason})"


def cache_line(cache: CacheSize) -> str:
    """Bits of keys and values, and the bytes of a sequence."""
    scheme = "as they are" if cache.scheme is None else cache.scheme.spelled
    lengths = sorted({AT_TOKENS} if cache.positions is None else {min(AT_TOKENS, cache.positions), cache.positions})
    taken = " and ".join(f"{gigabytes(cache.bytes_at(tokens))} at {tokens:,} tokens" for tokens in lengths)
    return f"cache: keys and values in {cache.bits_per_element:.4g} bits ({scheme}): {taken}, for each sequence"


def _memory_table(plan: Plan) -> Table:
    assert plan.needs is not None
    given = "no calibration text" if plan.windows is None else "{} windows of {}".format(*plan.windows)
    table = Table(title=f"Peak memory, {given}; an estimate", title_justify="left")
    for heading in ("memory", "peak", "when", "what fills it"):
        table.add_column(heading, justify="right" if heading == "peak" else "left")
    for name, estimate in _estimates(plan):
        peak = estimate.peak
        table.add_row(name, gigabytes(peak.total), peak.name, "\n".join(_largest_terms(peak)))
    return table


def _spread_lines(spread: Spread) -> Iterator[str]:
    """The memory of the model that writes text, device by device."""
    for device in spread.used:
        parts = ", ".join(f"{gigabytes(value)} {name}" for name, value in spread.terms(device).items())
        yield f"writing text, {spread.devices[device]}: {parts}"
    if spread.streamed:
        places: tuple[Place, ...] = ("main memory", "disk")
        taken = {place: spread.bytes_in(place) for place in places}
        parts = ", ".join(f"{gigabytes(size)} in {place}" for place, size in taken.items() if size)
        yield f"writing text, weights that come in each of {spread.steps:,} passes: {parts}"


def _disk_line(terms: dict[str, float]) -> str:
    parts = ", ".join(f"{gigabytes(value)} {name}" for name, value in terms.items())
    return f"disk: {gigabytes(sum(terms.values()))} at most: {parts}"


def _estimates(plan: Plan) -> list[tuple[str, MemoryEstimate]]:
    assert plan.needs is not None
    kept = [("GPU, in memory only (compare)", plan.needs.gpu_kept)] if plan.needs.gpu_kept != plan.needs.gpu else []
    return [
        ("RAM, on a CPU", plan.needs.cpu),
        ("GPU, on a GPU", plan.needs.gpu),
        *kept,
        ("RAM, on a GPU", plan.needs.gpu_host),
    ]


def _largest_terms(stage: Stage) -> list[str]:
    ordered = sorted(stage.terms.items(), key=lambda term: -term[1])
    shown = [(name, value) for name, value in ordered if value >= SHARE_SHOWN * stage.total]
    rest = stage.total - sum(value for _, value in shown)
    lines = [f"{gigabytes(value)} {name}" for name, value in shown]
    return [*lines, f"{gigabytes(rest)} other"] if rest > NOT_SHOWN else lines


def _shared(plan: Plan) -> str:
    return f", {plan.processes} like it" if plan.processes > 1 else ""


def _time_table(plan: Plan) -> Table:
    assert plan.time is not None
    table = Table(title=f"Time on this machine ({plan.device}){_shared(plan)}; an estimate", title_justify="left")
    table.add_column("for")
    table.add_column("time", justify="right")
    for name, seconds in plan.time.terms.items():
        table.add_row(name, duration(seconds))
    table.add_section()
    table.add_row("in all", duration(plan.time.total))
    return table


def duration(seconds: float) -> str:
    """A duration in words."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 20 else f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 360000 else f"{seconds / 86400:.0f} days"
