"""The memory and the work of text that a model writes. calibration/writing_sizes.py counts the memory."""

from __future__ import annotations

from mxrot.calibration.spreading import Spread
from mxrot.calibration.writing_sizes import WRITING, WritingSizes
from mxrot.planning.run import Run
from mxrot.planning.stage import Stage, merged_rotations

STREAMING = "weights for that, from main memory and disk"
"""The name of the additional time if the writing model is spread over devices."""
LAUNCHES, RECORDED = 30.0, 0.25
"""Operations of a block per token, and the share of their time that remains when they are recorded on a GPU."""
HOOKED_LAUNCHES = 60.0
"""The operations of a block with hooks that find its inputs' device. Assumed."""


def writing_stages(run: Run) -> list[Stage]:
    """The stages of memory for the calibration text. Empty if the model writes none."""
    if not run.recipe.writes_text:
        return []
    if run.spread is not None:  # first tokens take less: shorter, with as many at once
        return [Stage(WRITING, run.spread.terms(0) | merged_rotations(run))]
    return [Stage(name, terms | merged_rotations(run)) for name, terms in run.writing.stages.items()]


def writing_terms(run: Run, windows: int) -> dict[str, float]:
    """The memory for writing this number of windows, without the model. First tokens are left out."""
    sizes = run.writing.writing(windows)
    return sizes.together(sizes.sequences, sizes.length)


def writing_work(run: Run, windows: float, spread: Spread | None = None) -> dict[str, float]:
    """The amounts of work, by the name of their rate, for windows that the original model writes."""
    if windows <= 0 or run.recipe.is_data_free:
        return {}
    sizes = run.writing.writing(windows)
    drawing, length = sizes.drawing, sizes.length
    found = _steps(run, sizes, sizes.sequences, length, spread)
    if drawing.sequences:
        for name, amount in _steps(run, sizes, drawing.sequences, drawing.tokens, spread).items():
            found[name] += drawing.rounds * amount
    if run.recipe.calibration.chats:
        found["operations"] += 25.0 * length * _rounds(sizes, sizes.sequences, length, spread)
    return found


def _steps(run: Run, sizes: WritingSizes, sequences: int, length: int, spread: Spread | None) -> dict[str, float]:
    """The amounts for this number of sequences, token by token."""
    shape, s = run.shape, run.itemsize
    rounds = _rounds(sizes, sequences, length, spread)
    launches = HOOKED_LAUNCHES if spread else LAUNCHES
    # On a GPU a token is one graph, recorded and warmed up a few times; not with spread weights, which come and go.
    operations = launches * len(shape.blocks) * (RECORDED * length if run.is_gpu and spread is None else length)
    return {
        "product": 2.0 * shape.active_parameters * sequences * length,
        # Weights, read for each token; keys and values, half of them on average; the numbers of sampling.
        "copy": rounds * length * shape.parameters * s
        + sequences * length * (sizes.keys(length) / 2 + 30.0 * shape.vocabulary),
        "operations": rounds * operations,
    }


def _rounds(sizes: WritingSizes, sequences: int, length: int, spread: Spread | None) -> int:
    """The number of rounds of sequences that are written side by side."""
    return -(-sequences // sizes.at_once(length)) if spread is None else spread.rounds(sequences)
