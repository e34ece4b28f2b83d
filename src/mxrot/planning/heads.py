"""The memory for quantizing the head. It follows quantizing/head.py."""

from __future__ import annotations

from mxrot.formats.block import ENCODED_ELEMENTS
from mxrot.planning.choosing import DECODING, ENCODING
from mxrot.planning.run import Run
from mxrot.planning.stage import Stage

HEAD = "quantizing the head"


def coded_terms(run: Run) -> dict[str, float]:
    """The quantized head in main memory: codes, one per byte and packed, and their scales."""
    head = run.shape.head
    return {} if head is None else {"codes of the head": float(head.weights + head.coded_bytes)}


def head_stages(run: Run) -> list[Stage]:
    """The stages on the computing device: groups of rows in turn, in float64. On a CPU, everything outside of the
    blocks is there as well."""
    head = run.shape.head
    if head is None:
        return []
    rows = 8.0 * (2 + ENCODING + DECODING) * min(head.weights, ENCODED_ELEMENTS)
    terms = {"rows of the head while they are rounded": rows}
    if run.keeps_model:
        blocks = run.packed_block * len(run.shape.blocks)
        outer = float(run.shape.outer_parameters * run.itemsize)
        terms |= {"embedding, last norm and head": outer, "finished blocks": blocks}
    if not run.is_gpu:
        terms |= {"the same, as they are read": float(run.shape.outer_parameters * run.stored.itemsize)}
        terms |= coded_terms(run)
    return [Stage(HEAD, terms)]
