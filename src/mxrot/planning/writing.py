"""What text that a model writes takes: memory, and work; calibration/generation.py has what it follows."""

from __future__ import annotations

from mxrot.calibration.generation import BURN_IN, BURN_INS, SEQUENCE_TOKENS, cache_bytes, sequences_within
from mxrot.models import start_token
from mxrot.planning.run import Run
from mxrot.planning.stage import Stage, merged_rotations

DRAWN_SHARES = {"uniform": 0.0, "model": 1.0, "both": 0.5}
"""Of the sequences of free text, for which the model draws the first token."""


def writing_stages(run: Run) -> list[Stage]:
    """Of memory, for the text that is calibrated on; none where the model writes none."""
    if not run.recipe.calibration.writes or run.recipe.is_data_free:
        return []
    original = {"the original model": run.model_bytes, **merged_rotations(run)}
    sequences = _sequences(run, run.all_windows - run.windows)
    drawn, length, _ = _drawn(run, sequences)
    stages = [Stage("drawing first tokens", original | _written_together(run, drawn, length))] if drawn else []
    return [*stages, Stage("writing calibration text", original | _written_together(run, sequences, _length(run)))]


def writing_terms(run: Run, windows: int) -> dict[str, float]:
    """Of memory, what writing so many windows takes besides the model, first tokens left out."""
    return _written_together(run, _sequences(run, windows), _length(run))


def _written_together(run: Run, sequences: int, length: int) -> dict[str, float]:
    """The same of so many sequences of so many tokens."""
    keys = cache_bytes(run.shape.config, length, run.itemsize)
    at_once = min(sequences, sequences_within("cuda" if run.is_gpu else "cpu", keys, run.model_bytes))
    # Logits, their probabilities, and the sums of these, the last two in float32; and logits in float32, or divided by
    # a temperature, where the model's own are not those.
    others = run.itemsize < 4 or _has_heat(run)
    logits = at_once * run.shape.vocabulary * (run.itemsize + (12.0 if others else 8.0))
    return {"keys and values": float(at_once * keys), "logits and probabilities": logits}


def writing_work(run: Run, windows: float) -> dict[str, float]:
    """Amounts, by the name of the rate that they are done at, for windows that the original model writes."""
    if windows <= 0 or run.recipe.is_data_free:
        return {}
    sequences = _sequences(run, windows)
    found = _steps(run, sequences, _length(run))
    drawn, length, rounds = _drawn(run, sequences)
    if drawn:
        for name, amount in _steps(run, drawn, length).items():
            found[name] += rounds * amount
    if run.recipe.calibration.chats:
        found["operations"] += 25.0 * _length(run) * _rounds(run, sequences, _length(run))
    return found


def _steps(run: Run, sequences: int, length: int) -> dict[str, float]:
    """Of so many sequences, a token after the other."""
    shape, s = run.shape, run.itemsize
    keys, rounds = cache_bytes(shape.config, length, s), _rounds(run, sequences, length)
    # On a GPU a token is one recorded graph, recorded and warmed up a few times.
    operations = 30.0 * len(shape.blocks) * (0.25 * length if run.is_gpu else length)
    return {
        "product": 2.0 * shape.active_parameters * sequences * length,
        # The weights, read for each token; keys and values, half of them on average; and the numbers of a sample.
        "copy": rounds * length * shape.parameters * s + sequences * length * (keys / 2 + 30.0 * shape.vocabulary),
        "operations": rounds * operations,
    }


def _rounds(run: Run, sequences: int, length: int) -> int:
    """How often sequences are written side by side until all are."""
    keys = cache_bytes(run.shape.config, length, run.itemsize)
    return -(-sequences // sequences_within("cuda" if run.is_gpu else "cpu", keys, run.model_bytes))


def _sequences(run: Run, windows: float) -> int:
    return -(-round(windows * run.seq_len) // _length(run))


def _length(run: Run) -> int:
    """Tokens of a sequence."""
    return min(SEQUENCE_TOKENS, run.seq_len)


def _drawn(run: Run, sequences: int) -> tuple[int, int, int]:
    """Of how many sequences the model draws the first token, how many tokens it writes for that, and how often."""
    choice = run.recipe.calibration
    if not DRAWN_SHARES[choice.first]:
        return 0, 0, 0
    free = sequences * (1 - choice.prompted - choice.chats)
    tokens, rounds = (BURN_IN, BURN_INS) if start_token(run.shape.config) is None else (2, 1)
    return round(DRAWN_SHARES[choice.first] * free), tokens, rounds


def _has_heat(run: Run) -> bool:
    """Are logits divided by temperatures?"""
    return set(run.recipe.calibration.temperatures) != {1.0}
