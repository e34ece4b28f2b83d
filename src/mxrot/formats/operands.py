"""How the operands of attention's two products, q k^T and p v, are quantized."""

from __future__ import annotations

from dataclasses import dataclass

from mxrot.errors import ConfigError
from mxrot.formats.quantizer import TensorQuantizer


@dataclass(frozen=True)
class AttentionOperands:
    """The quantizers of both products. Operands are quantized in blocks along the summed dimension, or left as they
    are.

    ConfigError for quantizers that the operands cannot have.
    """

    queries_keys: TensorQuantizer | None = None
    """For q k^T: in blocks along the width of a head."""
    probabilities_values: TensorQuantizer | None = None
    """For p v: in blocks along the attended tokens."""

    def __post_init__(self) -> None:
        if self.queries_keys is None and self.probabilities_values is None:
            raise ConfigError("attention: queries_keys and probabilities_values are both empty; leave the table out")
        for name, quantizer in self.by_name.items():
            if quantizer is not None and not quantizer.rule.dynamic:
                raise ConfigError(f"attention: {name}: rule {quantizer.rule.name!r} is for weights only")
        values = self.probabilities_values
        if values is not None and (values.format.block is None or _looks_beyond_block(values)):
            raise ConfigError(
                f"attention: probabilities_values: {values.spelled} has scales that depend on the whole row, which is "
                "of tokens here, also of those that come later; take a format whose blocks have scales of their own, "
                "such as mxfp4"
            )

    @property
    def by_name(self) -> dict[str, TensorQuantizer | None]:
        """By their names in recipes and checkpoints."""
        return {"queries_keys": self.queries_keys, "probabilities_values": self.probabilities_values}

    @property
    def head_block(self) -> int:
        """The width of a head must be a multiple of this."""
        return 1 if self.queries_keys is None else self.queries_keys.format.block or 1

    @property
    def spelled(self) -> str:
        """In words: "queries and keys mxfp4 even, probabilities and values in 16 bit"."""
        return ", ".join(
            f"{name.replace('_', ' and ')} {'in 16 bit' if quantizer is None else quantizer.spelled}"
            for name, quantizer in self.by_name.items()
        )


def _looks_beyond_block(quantizer: TensorQuantizer) -> bool:
    """True if scales depend on other blocks, of the same row or of others."""
    format = quantizer.format
    return format.grid.looks_at_whole_tensor(format.rule(quantizer.rule.name))
