"""What a model that writes text takes of memory: what a plan says, and what decides where it runs."""

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
"""Of the sequences of free text, for which the model draws the first token."""
WRITING = "writing calibration text"


@dataclass(frozen=True)
class Drawing:
    """First tokens that the model draws."""

    sequences: int
    tokens: int
    """That it writes for one of them."""
    rounds: int
    """How often it does."""


@dataclass(frozen=True)
class WritingSizes:
    """A model, and the text that it shall write."""

    config: Any
    """Of transformers."""
    choice: CalibrationChoice
    windows: float
    """That it writes."""
    seq_len: int
    itemsize: int
    """Bytes of a number that it computes with."""
    device_type: str
    outer: float
    """Bytes outside of the decoder blocks."""
    blocks: tuple[float, ...]
    """Bytes of each decoder block."""
    beside: float = 0.0
    """Bytes that are on the first device anyway: rotations."""

    @staticmethod
    def of(
        model: PreTrainedModel, family: Family, choice: CalibrationChoice, shape: tuple[int, int], dtype: torch.dtype
    ) -> WritingSizes:
        """Of a skeleton that computes in `dtype` on a GPU; `shape` is that of the windows that are given."""
        s, (given, seq_len) = dtype.itemsize, shape
        decoder = model.get_submodule(family.blocks).children()
        blocks = tuple(float(s * sum(parameter.numel() for parameter in block.parameters())) for block in decoder)
        outer = float(s * sum(parameter.numel() for parameter in model.parameters())) - sum(blocks)
        return WritingSizes(model.config, choice, choice.written(given), seq_len, s, "cuda", outer, blocks)

    @property
    def weights(self) -> float:
        """Bytes of the whole model."""
        return self.outer + sum(self.blocks)

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return min(SEQUENCE_TOKENS, self.seq_len)

    @property
    def sequences(self) -> int:
        return -(-round(self.windows * self.seq_len) // self.length)

    @property
    def drawing(self) -> Drawing:
        """None of the sequences where first tokens are not drawn."""
        free = self.sequences * (1 - self.choice.prompted - self.choice.chats)
        tokens, rounds = (BURN_IN, BURN_INS) if start_token(self.config) is None else (2, 1)
        return Drawing(round(DRAWN_SHARES[self.choice.first] * free), tokens, rounds)

    def at_once(self, length: int) -> int:
        """Sequences of so many tokens that are written side by side where one device holds the model."""
        return sequences_within(self.device_type, self.keys(length), self.weights)

    def keys(self, length: int) -> int:
        """Bytes of keys and values of one sequence of so many tokens."""
        return cache_bytes(self.config, length, self.itemsize)

    @property
    def logits(self) -> float:
        """Bytes of what becomes a token of one sequence: logits, their probabilities, and the sums of these, the last
        two in float32; and logits in float32, or divided by a temperature, where the model's own are not those."""
        others = self.itemsize < 4 or set(self.choice.temperatures) != {1.0}
        return float(self.config.get_text_config().vocab_size) * (self.itemsize + (12.0 if others else 8.0))

    def together(self, sequences: int, length: int) -> dict[str, float]:
        """Bytes besides the model, of so many sequences of so many tokens, those of them that are written at once."""
        at_once = min(sequences, self.at_once(length))
        return {
            "keys and values": float(at_once * self.keys(length)),
            "logits and probabilities": at_once * self.logits,
        }

    def writing(self, windows: float) -> WritingSizes:
        """The same model writing so many windows."""
        return replace(self, windows=windows)

    @cached_property
    def stages(self) -> dict[str, dict[str, float]]:
        """What is in memory at each moment, besides what was there before, where one device holds the model."""
        drawing = self.drawing
        found = {"drawing first tokens": self.together(drawing.sequences, drawing.tokens)} if drawing.sequences else {}
        found[WRITING] = self.together(self.sequences, self.length)
        return {name: {"the original model": self.weights} | terms for name, terms in found.items()}

    @property
    def on_one_device(self) -> float:
        """Bytes that it takes there at most."""
        return self.beside + max(sum(terms.values()) for terms in self.stages.values())
