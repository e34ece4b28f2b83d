"""The table `[choice]` of a recipe: changes that are tried on the model before it is quantized."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mxrot.errors import ConfigError
from mxrot.tables import key_and_value
from mxrot.typed import check_fields

MOST_CANDIDATES = 8
"""The maximum number of candidates. Any subset may be kept, so each subset is checked before any work."""


@dataclass(frozen=True)
class Choice:
    """Candidate changes of the recipe. Each is tried on the model and kept if it helps on text that no fit has seen."""

    candidates: tuple[str, ...]
    """Each is "KEY=VALUE", or several of these separated by semicolons: "rounding.target=own; rounding.damping=1.0".
    They are tried one after the other, each together with those kept so far."""
    held_out: float = 0.125
    """The share of windows, given and written, that the model is measured on."""
    unseen: Literal["windows", "kinds"] = "windows"
    """"windows": the model is fitted to the other windows of all kinds. "kinds": it is fitted to each kind alone, and
    measured on the others."""

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
        """Steps that cannot come before or after a choice. `writes` is True if the model writes calibration text."""
        if trains_rotations:
            yield "choice: rotations would be trained for each candidate anew; set rotation.steps = 0"
        if is_data_free:
            yield 'choice: nothing looks at calibration text, so there is nothing to choose by it; set choice = "none"'
        if self.unseen == "kinds" and not writes:
            yield 'choice: unseen = "kinds": no other kind is there without written text; set calibration.generated'

    @staticmethod
    def changes_of(candidate: str) -> dict[str, Any]:
        """The dotted keys of a candidate and their values. ConfigError for a key that decides what is installed."""
        found = dict(key_and_value(part.strip(), "choice: candidates:") for part in candidate.split(";"))
        for key in found:
            if key.partition(".")[0] not in ("rounding", "transform", "smoothing") and key != "calibration.generated":
                raise ConfigError(
                    f"choice: candidates: {key} cannot be chosen; keys of rounding, transform and smoothing can be, "
                    "and calibration.generated"
                )
        return found
