"""The tables of a recipe, one record for each. The tables of methods are the methods themselves; `[tuning]` is in
tuning_options.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from mxrot.errors import ConfigError
from mxrot.formats import FORMATS, AttentionOperands, CacheScheme, CacheTransform, TensorQuantizer, Uniform
from mxrot.formats.block_scales import E8M0
from mxrot.transforms import BlockDiagonalSpec, ChannelOrder, SmoothingBy, StageSpec
from mxrot.tuning_options import Refit as Refit
from mxrot.tuning_options import Tuning as Tuning
from mxrot.typed import check_fields


@dataclass(frozen=True)
class QuantizerChoice:
    """A format and a scale rule, by name."""

    format: str
    rule: str = ""
    """If empty, the default rule of the format."""
    clip: float = 1.0
    """A factor for the largest and the smallest element of a block, applied before the scale is chosen."""

    def __post_init__(self) -> None:
        check_fields(self, "")

    def quantizer(self) -> TensorQuantizer:
        return TensorQuantizer.of(self.format, self.rule or None, self.clip)

    def for_inputs(self) -> TensorQuantizer:
        """The same quantizer for inputs: each row, which is one token, is quantized by itself."""
        found = self.quantizer()
        return TensorQuantizer(found.format, found.rule.for_rows())


@dataclass(frozen=True)
class AttentionChoice:
    """Formats of the operands in the products of attention, each with its default rule. An empty name: 16 bit."""

    queries_keys: str = ""
    """The format of the operands of q k^T, in blocks along the width of a head."""
    probabilities_values: str = ""
    """The format of the operands of p v, in blocks along the tokens that are attended to."""

    def __post_init__(self) -> None:
        check_fields(self, "attention")
        self.operands()

    def operands(self) -> AttentionOperands:
        """The quantizers of the operands. ConfigError if operands cannot have these formats."""
        named = (self.queries_keys, self.probabilities_values)
        try:
            return AttentionOperands(*(QuantizerChoice(name).for_inputs() if name else None for name in named))
        except ConfigError as error:
            said = str(error)
            raise ConfigError(said if said.startswith("attention: ") else f"attention: {said}") from error


@dataclass(frozen=True)
class HeadChoice:
    """The head as a quantized linear. Its weights are rounded to nearest, and each block has a power-of-two scale."""

    format: str = "mxint8"
    """The format of the weights."""
    rule: str = ""
    """The scale rule of the weights. If empty, the default rule of the format."""
    inputs: str = ""
    """The format of the inputs, with its default rule; each token is quantized by itself. An empty name: 16 bit."""
    transform: Literal["none", "hadamard"] = "none"
    """The transform of the inputs: the Hadamard matrix in blocks of 32. It spreads outlier channels in weights and
    inputs."""

    def __post_init__(self) -> None:
        check_fields(self, "head")
        for key, quantizer in (("format", self.weights()), ("inputs", self.activations())):
            if quantizer is not None:
                check_head_quantizer(quantizer, f"head: {key}")

    @staticmethod
    def named(text: str) -> HeadChoice:
        """The choice for "WEIGHTS" or "WEIGHTS/INPUTS". It has the transform if inputs are quantized or weights have
        fewer than 8 bits.

        mxfp8 is short for mxfp8_e4m3. ConfigError for anything else.
        """
        names = [SHORT_NAMES.get(name, name) for name in text.split("/")]
        if len(names) > 2 or not all(names):
            raise ConfigError("expected a format, or WEIGHTS/INPUTS")
        found = HeadChoice(names[0], inputs=names[1] if len(names) > 1 else "")
        is_coarse = found.inputs or found.weights().format.bits < 8
        return replace(found, transform="hadamard") if is_coarse else found

    def weights(self) -> TensorQuantizer:
        """The format and rule of the weights. ConfigError for unknown names."""
        return self._quantizer("format", QuantizerChoice(self.format, self.rule))

    def activations(self) -> TensorQuantizer | None:
        """The format and rule of the inputs. None if they stay in 16 bit."""
        if not self.inputs:
            return None
        self._quantizer("inputs", QuantizerChoice(self.inputs))
        return QuantizerChoice(self.inputs).for_inputs()

    def stages(self) -> tuple[StageSpec, ...]:
        """The stages of the input transform."""
        return () if self.transform == "none" else (BlockDiagonalSpec(HEAD_BLOCK, "site"),)

    @property
    def spelled(self) -> str:
        """The formats in words: "mxfp8_e4m3", "mxfp4 with mxfp4 inputs"."""
        return f"{self.format} with {self.inputs} inputs" if self.inputs else self.format

    @staticmethod
    def _quantizer(key: str, choice: QuantizerChoice) -> TensorQuantizer:
        try:
            return choice.quantizer()
        except ConfigError as error:
            raise ConfigError(f"head: {key}: {error}") from error


SHORT_NAMES = {"mxfp8": "mxfp8_e4m3"}
HEAD_BLOCK = 32
"""Elements in a block, for all formats with power-of-two scales."""


def check_head_quantizer(quantizer: TensorQuantizer, where: str) -> None:
    """ConfigError, which names the formats of heads, if weights or inputs of a head cannot have this quantizer."""
    taken = [name for name, one in FORMATS.items() if isinstance(one.grid, Uniform) and one.grid.scale == E8M0]
    if quantizer.format.name not in taken or not quantizer.rule.is_power_of_two:
        raise ConfigError(
            f"{where}: {quantizer.spelled} has no power of two a block; take one of {', '.join(taken)}, with a rule "
            "such as even"
        )


@dataclass(frozen=True)
class Smoothing:
    """SmoothQuant scales."""

    alpha: float
    """The share of the difficulty that moves into the weights, from 0 to 1."""
    skip: tuple[str, ...] = ()
    """Sites that are not smoothed."""
    by: SmoothingBy = "maxima"
    """How the difficulty of a channel is measured: by its largest magnitude, or by its root mean square."""

    def __post_init__(self) -> None:
        check_fields(self, "smoothing")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"smoothing: alpha {self.alpha} is not in [0, 1]")


First = Literal["uniform", "model", "both"]
"""How the first token of free text is drawn: uniformly from the vocabulary, by the model, or alternately."""


@dataclass(frozen=True)
class CalibrationChoice:
    """The text of calibration, and how much of it."""

    samples: int = 128
    """The most windows. A shorter text gives fewer."""
    seq_len: int = 2048
    """Tokens in a window."""
    generated: float = 0.0
    """Windows that the original model writes, for each window of the text."""
    own: int = 0
    """Additional windows that it writes, even without a text: the text `own` of --calib."""
    first: First = "uniform"
    """How the first token of free text is drawn."""
    prompted: float = 0.0
    """The share of sequences that continue a piece of the text."""
    chats: float = 0.0
    """The share of sequences that are conversations in the model's chat template. The model writes both sides. If the
    tokenizer has no chat template, these sequences are free text."""
    temperatures: tuple[float, ...] = (1.0,)
    """Temperatures of sampling. The sequences take them in turn."""
    held_out: float = 0.0
    """The share of windows, given and written, that no statistic sees. Roundings choose their parameters by these
    windows."""

    def __post_init__(self) -> None:
        check_fields(self, "calibration")
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"calibration: held_out {self.held_out} is not at least 0 and below 1")
        if self.own < 0:
            raise ConfigError(f"calibration: own must not be negative, got {self.own}")
        if self.samples < (self.own == 0):
            raise ConfigError(f"calibration: samples must be positive, got {self.samples}")
        if self.seq_len < 2:
            raise ConfigError(f"calibration: seq_len must be at least 2, got {self.seq_len}")
        if not 0 <= self.generated < math.inf:
            raise ConfigError(f"calibration: generated must be finite and not negative, got {self.generated}")
        if not (self.prompted >= 0 and self.chats >= 0 and self.prompted + self.chats <= 1):
            raise ConfigError(
                f"calibration: prompted {self.prompted} and chats {self.chats} are not shares from 0 to 1, together at "
                "most 1"
            )
        if not self.temperatures or not all(0 < value < math.inf for value in self.temperatures):
            raise ConfigError(
                f"calibration: temperatures must be positive, finite and at least one, got {list(self.temperatures)}"
            )

    @property
    def writes(self) -> bool:
        """True if the original model writes text."""
        return bool(self.generated or self.own)

    def written(self, given: int) -> int:
        """The number of windows that the original model writes if the text has `given` windows."""
        return self.own + (max(1, round(self.generated * given)) if self.generated and given else 0)


RotationKind = Literal["none", "hadamard", "orthogonal"]
"""No rotation, a Hadamard matrix with random signs, or a matrix drawn uniformly from all orthogonal ones."""


@dataclass(frozen=True)
class Rotation:
    """Rotations that are merged into the weights on both sides. Nothing is computed at run time."""

    residual: RotationKind = "none"
    """The rotation of the residual stream (R1 in SpinQuant). Norm gains are folded, and the head is untied."""
    value_heads: RotationKind = "none"
    """The rotation of the values of attention (R2): one matrix in each decoder block, for all of its heads."""
    steps: int = 0
    """Training steps on the calibration text, by the cross entropy of the quantized network. With 0 the matrices stay
    as drawn."""
    rate: float = 1.5
    """The learning rate at the start. It falls to 0 along a cosine. No step is longer than 1 / |A|_1
    (tuning/cayley.py)."""
    batch_windows: int = 8
    """Calibration windows in each step."""
    quantized_weights: bool = False
    """True if the training also quantizes the weights, and not only the inputs."""

    @property
    def spelled(self) -> str:
        """In words: "the residual stream (hadamard) and the value heads (orthogonal)"."""
        kinds = {"the residual stream": self.residual, "the value heads": self.value_heads}
        found = " and ".join(f"{what} ({kind})" for what, kind in kinds.items() if kind != "none")
        return f"{found}, trained in {self.steps} steps" if self.steps else found

    def __post_init__(self) -> None:
        check_fields(self, "rotation")
        if self.residual == self.value_heads == "none":
            raise ConfigError('rotation: residual and value_heads are both "none"; set one of them, or leave both out')
        if self.steps < 0:
            raise ConfigError(f"rotation: steps must not be negative, got {self.steps}")
        if not 0 < self.rate < math.inf:
            raise ConfigError(f"rotation: rate must be positive and finite, got {self.rate}")
        if self.batch_windows < 1:
            raise ConfigError(f"rotation: batch_windows must be at least 1, got {self.batch_windows}")


@dataclass(frozen=True)
class PermutationChoice:
    """Orders of channels that can be changed at no run-time cost. They are found on the calibration text before
    anything is quantized (transforms/channel_order.py)."""

    ffn: ChannelOrder = "none"
    """The order of the inner channels of an MLP, or of each expert."""
    value_heads: ChannelOrder = "none"
    """The order of the channels inside each value head."""

    @property
    def spelled(self) -> str:
        """In words: "inner channels of MLPs (correlated) and channels of value heads (balanced)"."""
        kinds = {"inner channels of MLPs": self.ffn, "channels of value heads": self.value_heads}
        return " and ".join(f"{what} ({kind})" for what, kind in kinds.items() if kind != "none")

    def __post_init__(self) -> None:
        check_fields(self, "permutation")
        if self.ffn == self.value_heads == "none":
            raise ConfigError('permutation: ffn and value_heads are both "none"; set one of them, or leave both out')


@dataclass(frozen=True)
class CacheChoice:
    """How keys and values are stored: each token and head by itself, in blocks along the width of a head."""

    keys: str = "mxfp4"
    """The format of keys, after their norm and RoPE."""
    values: str = "mxfp4"
    """The format of values."""
    rule: str = ""
    """The scale rule of both. If empty, the default rule of each format."""
    clip: float = 1.0
    """A factor for the largest and the smallest element of a block, applied before the scale is chosen."""
    transform: Literal["none", "hadamard", "second_moment"] = "none"
    """The transform. Keys are multiplied by it at run time, and queries by its inverse transpose. For values it is
    merged into the weights before and after them. "hadamard": the Hadamard matrix of the width of a head (R3 of QuaRot
    and SpinQuant); values have it only if [rotation] does not rotate their heads. "second_moment": a matrix for each
    head of keys and values, fitted to them and to what reads them (WUSH-KV)."""
    first: int = 0
    """Tokens at the start of a sequence that are read in 16 bits."""
    last: int = 0
    """The newest tokens, the query's own included, that each query reads in 16 bits."""

    def __post_init__(self) -> None:
        check_fields(self, "cache")
        self.scheme()

    @property
    def is_fitted(self) -> bool:
        """True if the transforms are fitted to the inputs of attention."""
        return self.transform == "second_moment"

    def turns_values(self, rotation: Rotation | None) -> bool:
        """True if a Hadamard matrix is merged into the weights around the values. False if a rotation already is."""
        return self.transform == "hadamard" and (rotation is None or rotation.value_heads == "none")

    def scheme(self) -> CacheScheme:
        """The scheme that is installed. ConfigError if a cache cannot have these formats."""
        transforms: dict[str, CacheTransform] = {"none": "none", "hadamard": "hadamard", "second_moment": "stored"}
        try:
            keys, values = (
                QuantizerChoice(name, self.rule, self.clip).for_inputs() for name in (self.keys, self.values)
            )
            return CacheScheme(keys, values, self.first, self.last, key_transform=transforms[self.transform])
        except ConfigError as error:
            said = str(error)
            raise ConfigError(said if said.startswith("cache: ") else f"cache: {said}") from error
