"""The table `[choice]` of a recipe: what is tried on the model itself before it is quantized for good."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mxrot.errors import ConfigError
from mxrot.tables import key_and_value
from mxrot.typed import check_fields

MOST_CANDIDATES = 8
"""Each of their subsets may be what is kept, and is checked before any work."""


@dataclass(frozen=True)
class Choice:
    """Changes of the recipe that are tried on the model, and kept where they help on text that no fit has seen."""

    candidates: tuple[str, ...]
    """Each "KEY=VALUE", or several of them with a semicolon between: "rounding.target=own; rounding.damping=1.0". They
    are tried one after the other, each on top of what has been kept until then."""
    held_out: float = 0.125
    """Share of the windows of each kind, given text and what the model writes, that a model is measured on."""
    unseen: Literal["windows", "kinds"] = "windows"
    """"windows": fitted to the other windows of all kinds; "kinds": fitted to each kind alone, and measured on the
    others."""

    def __post_init__(self) -> None:
        check_fields(self, "choice")
        if not self.candidates:
            raise ConfigError('choice: candidates are none; name some, such as ["rounding.target=own"]')
        if not 0 < self.held_out < 1:
            raise ConfigError(f"choice: held_out {self.held_out} is not between 0 and 1")
        if len(self.candidates) > MOST_CANDIDATES:
            raise ConfigError(f"choice: candidates: at most {MOST_CANDIDATES} are tried, got {len(self.candidates)}")
        for text in self.candidates:
            self.changes_of(text)

    def problems(self, writes: bool, trains_rotations: bool, is_data_free: bool) -> Iterator[str]:
        """What cannot be done before or after a choice; does the model write calibration text?"""
        if trains_rotations:
            yield "choice: rotations would be trained for each candidate anew; set rotation.steps = 0"
        if is_data_free:
            yield 'choice: nothing looks at calibration text, so there is nothing to choose by it; set choice = "none"'
        if self.unseen == "kinds" and not writes:
            yield 'choice: unseen = "kinds": no other kind is there without written text; set calibration.generated'

    @staticmethod
    def changes_of(candidate: str) -> dict[str, Any]:
        """The keys that a candidate sets, dotted, and what to; ConfigError for those that decide what is installed."""
        found = dict(key_and_value(part.strip(), "choice: candidates:") for part in candidate.split(";"))
        for key in found:
            if key.partition(".")[0] not in ("rounding", "transform", "smoothing") and key != "calibration.generated":
                raise ConfigError(
                    f"choice: candidates: {key} cannot be chosen; keys of rounding, transform and smoothing can be, "
                    "and calibration.generated"
                )
        return found
