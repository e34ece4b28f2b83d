"""The result for a terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator

from rich import box
from rich.table import Table

from mxrot.report.side_by_side import WIDTH
from mxrot.search.found import BASE, Found, Kl

BLOCKS_SHOWN = 5
LEAST_DIGITS = 4


def found_tables(found: Found, title: str) -> Iterator[Table]:
    """Tables of the models, and of the gains of single kinds of sites."""
    digits = _digits(found.alone.base)
    table = _table(title, ("",), ("bits a\nweight", "bits an\ninput", "KL,\nsearched", "KL,\nunseen"))
    for row in found.rows:
        unseen = "" if row.unseen is None else _spelled(row.unseen, digits)
        label = f"{row.label} ({found.base.spelled})" if row.label == BASE else row.label
        table.add_row(label, f"{row.bits.weights:.3f}", f"{row.bits.inputs:.3f}", _spelled(row.seen, digits), unseen)
    yield table
    alone = _table(
        "one kind raised in all blocks", ("site", "to"), ("bits a\nweight", "bits an\ninput", "KL", "falls by")
    )
    for (kind, choice), kl in found.alone.kinds.items():
        bits = found.kind_bits[kind, choice]
        share = f"{100 * (1 - kl / found.alone.base):.1f} %" if found.alone.base else ""
        alone.add_row(kind, choice.spelled, f"{bits.weights:.3f}", f"{bits.inputs:.3f}", f"{kl:.{digits}f}", share)
    yield alone


def found_lines(found: Found) -> Iterator[str]:
    """Lines with the raised sites, and the meaning of the figures."""
    alone, digits = found.alone, _digits(found.alone.base)
    best = sorted(alone.blocks, key=lambda block: alone.blocks[block])[:BLOCKS_SHOWN]
    said = ", ".join(f"{block} ({alone.blocks[block]:.{digits}f})" for block in best)
    lines = [f"blocks that gain most, each raised alone to {alone.blocks_to.spelled}, and KL then: {said}"]
    if not found.raised:
        lines.append("raised: nothing; no raise that was measured gains anything within the limit")
    lines += _raised_lines(found)
    lines.append(
        "KL: KL(original || quantized), nats a token, +- one standard error over windows; "
        f"{len(found.measured)} mixtures were measured"
    )
    if found.rows[0].unseen is not None:
        lines.append("unseen: as many windows that the search was not given; judge the mixture by these")
    for line in lines:
        yield textwrap.fill(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


def _raised_lines(found: Found) -> Iterator[str]:
    """One line per choice, with the blocks of each kind."""
    for choice in dict.fromkeys(one.choice for one in found.raised):
        blocks: dict[str, list[str]] = {}
        for one in found.raised:
            if one.choice == choice:
                for kind in one.kinds:
                    blocks.setdefault(kind, []).append(one.blocks_in_words)
        said = "; ".join(f"{kind} of {', '.join(runs)}" for kind, runs in blocks.items())
        yield f"raised: to {choice.in_words}, by blocks: {said}"


def _table(title: str, words: tuple[str, ...], numbers: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in words + numbers:
        table.add_column(heading, justify="left" if heading in words else "right")
    return table


def _digits(kl: float) -> int:
    """The number of decimals that gives such a KL three significant digits."""
    return LEAST_DIGITS if kl <= 0 else max(LEAST_DIGITS, 2 - math.floor(math.log10(kl)))


def _spelled(kl: Kl, digits: int) -> str:
    return f"{kl.mean:.{digits}f}" + ("" if math.isnan(kl.error) else f" +- {kl.error:.{digits}f}")
