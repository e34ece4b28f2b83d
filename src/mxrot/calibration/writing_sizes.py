"""The memory of a model that writes text. A plan prints it, and it decides where the model runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from mxrot.calibration.generation import BURN_IN, BURN_INS, SEQUENCE_TOKENS, cache_bytes, sequences_within
from mxrot.models import Family, start_token
from mxrot.sections import CalibrationChoice

DRAWN_SHARES = {"uniform": 0.0, "model": 1.0, "both": 0.5}
"""The shares of the free-text sequences whose first token the model draws."""
WRITING = "writing calibration text"


@dataclass(frozen=True)
class Drawing:
    """First tokens that the model draws."""

    sequences: int
    tokens: int
    """Tokens the model writes for one."""
    rounds: int
    """The number of rounds."""


@dataclass(frozen=True)
class WritingSizes:
    """The sizes of a model, and of the text that it writes."""

    config: Any
    """The config of transformers."""
    choice: CalibrationChoice
    windows: float
    """The windows that it writes."""
    seq_len: int
    itemsize: int
    """The bytes of a number in its compute type."""
    device_type: str
    outer: float
    """The bytes outside of the decoder blocks."""
    blocks: tuple[float, ...]
    """The bytes of each decoder block."""
    beside: float = 0.0
    """Other bytes on the first device: rotations."""
    family: Family | None = None
    """The family of the model; None: that of the config."""

    @staticmethod
    def of(
        model: PreTrainedModel, family: Family, choice: CalibrationChoice, shape: tuple[int, int], dtype: torch.dtype
    ) -> WritingSizes:
        """The sizes of a skeleton that computes in `dtype` on a GPU. `shape` is that of the given windows."""
        s, (given, seq_len) = dtype.itemsize, shape
        decoder = model.get_submodule(family.blocks).children()
        blocks = tuple(float(s * sum(parameter.numel() for parameter in block.parameters())) for block in decoder)
        outer = float(s * sum(parameter.numel() for parameter in model.parameters())) - sum(blocks)
        windows = choice.written(given)
        return WritingSizes(model.config, choice, windows, seq_len, s, "cuda", outer, blocks, family=family)

    @property
    def weights(self) -> float:
        """The bytes of the whole model."""
        return self.outer + sum(self.blocks)

    @property
    def length(self) -> int:
        """The tokens of a sequence."""
        return min(SEQUENCE_TOKENS, self.seq_len)

    @property
    def sequences(self) -> int:
        return -(-round(self.windows * self.seq_len) // self.length)

    @property
    def drawing(self) -> Drawing:
        """The drawn first tokens; for no sequence if none are drawn."""
        free = self.sequences * (1 - self.choice.prompted - self.choice.chats)
        tokens, rounds = (BURN_IN, BURN_INS) if start_token(self.config) is None else (2, 1)
        return Drawing(round(DRAWN_SHARES[self.choice.first] * free), tokens, rounds)

    def at_once(self, length: int) -> int:
        """The number of sequences of `length` tokens written side by side if one device holds the model."""
        return sequences_within(self.device_type, self.keys(length), self.weights)

    def keys(self, length: int) -> int:
        """The bytes of keys and values of one sequence of `length` tokens."""
        return cache_bytes(self.config, length, self.itemsize, self.family)

    @property
    def logits(self) -> float:
        """The bytes for the next token of one sequence: logits, their probabilities and the cumulative sums of these,
        the last two in float32. Logits in float32, or divided by a temperature, are added if they differ from the
        model's own."""
        others = self.itemsize < 4 or set(self.choice.temperatures) != {1.0}
        return float(self.config.get_text_config().vocab_size) * (self.itemsize + (12.0 if others else 8.0))

    def together(self, sequences: int, length: int) -> dict[str, float]:
        """The bytes besides the model for `sequences` sequences of `length` tokens, counting those written at once."""
        at_once = min(sequences, self.at_once(length))
        return {
            "keys and values": float(at_once * self.keys(length)),
            "logits and probabilities": at_once * self.logits,
        }

    def writing(self, windows: float) -> WritingSizes:
        """The same model writing this many windows."""
        return replace(self, windows=windows)

    @cached_property
    def stages(self) -> dict[str, dict[str, float]]:
        """The memory at each stage, beyond what was in memory before, if one device holds the model."""
        drawing = self.drawing
        found = {"drawing first tokens": self.together(drawing.sequences, drawing.tokens)} if drawing.sequences else {}
        found[WRITING] = self.together(self.sequences, self.length)
        return {name: {"the original model": self.weights} | terms for name, terms in found.items()}

    @property
    def on_one_device(self) -> float:
        """The peak of bytes there."""
        return self.beside + max(sum(terms.values()) for terms in self.stages.values())
