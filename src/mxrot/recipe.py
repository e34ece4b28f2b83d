"""A recipe composes formats, a transform, a rounding and a calibration. It is a TOML file.

Everything that can be wrong with a recipe is found here, before any weight is loaded: unknown keys, values of
the wrong type, and combinations that cannot work are a ConfigError that names the key.
"""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mxrot.errors import ConfigError
from mxrot.formats import get_format
from mxrot.layers import TensorQuantizer
from mxrot.rounding import RoundingMethod, get_rounding
from mxrot.transforms import Sharing, TransformMethod, get_transform
from mxrot.tuning import Tuning

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
Accumulation = Literal["exact", "fast"]

BUILTIN_FOLDER = Path(__file__).parent / "recipes"
TRANSFORM_BLOCK = 32
"""Channels that one transform matrix mixes: the block of the MX formats."""


@dataclass(frozen=True)
class QuantizerChoice:
    """A format and a scale rule, by name."""

    format: str
    rule: str = ""
    """Empty: the format's default rule."""

    def quantizer(self) -> TensorQuantizer:
        format = get_format(self.format)
        return TensorQuantizer(format, format.rule(self.rule or None))


@dataclass(frozen=True)
class Smoothing:
    """SmoothQuant scales."""

    alpha: float
    """Share of the difficulty that moves into the weights, 0 to 1."""
    skip: tuple[str, ...] = ()
    """Sites left without smoothing."""


@dataclass(frozen=True)
class CalibrationChoice:
    """How much text calibration sees."""

    samples: int = 128
    """Windows at most; a shorter text gives fewer."""
    seq_len: int = 2048
    """Tokens a window."""
    generated: float = 0.0
    """Windows that the original model writes itself, for each one of the text; it must fit on the device as a whole
    for that."""


@dataclass(frozen=True)
class Recipe:
    """How to quantize a model."""

    name: str
    weights: QuantizerChoice
    transform: TransformMethod
    rounding: RoundingMethod
    summary: str = ""
    source: str = ""
    activations: QuantizerChoice | None = None
    """None leaves activations as they are."""
    sharing: Sharing = "site"
    smoothing: Smoothing | None = None
    calibration: CalibrationChoice = field(default_factory=CalibrationChoice)
    tuning: Tuning | None = None
    """What follows the closed form; None for nothing."""
    ignore: tuple[str, ...] = ()
    """Shell-style patterns of linears to leave as they are, on the full name or its last part."""
    accumulation: Accumulation = "exact"
    """How FP8 products are summed on matrix hardware: "exact" as accurately as bfloat16 products are; "fast" in fewer
    bits."""

    def __post_init__(self) -> None:
        weights = self._quantizer("weights", self.weights)
        self.rounding.check(weights.format, weights.rule)
        score = getattr(self.transform, "score", "")
        measures_error = score in ("error", "joint")
        if score == "joint":
            self._require(
                TRANSFORM_BLOCK % weights.format.block == 0,
                f'transform score = "joint" sees blocks of {TRANSFORM_BLOCK}, and weights in {weights.format.name} '
                f"have blocks of {weights.format.block}",
            )
        if self.activations is None:
            self._require(not measures_error, 'transform score = "error" or "joint" needs activations')
        else:
            activations = self._quantizer("activations", self.activations)
            rule, format = activations.rule, activations.format
            self._require(rule.dynamic, f"activations: rule {rule.name!r} is for weights only")
            self._require(
                not measures_error or TRANSFORM_BLOCK % format.block == 0,
                f'transform score = "{score}" sees blocks of {TRANSFORM_BLOCK}, and activations in {format.name} '
                f"have blocks of {format.block}",
            )
        if self.tuning is not None:
            self._require(self.activations is not None, "tuning needs quantized activations")
            self._require(weights.is_exact_in_bfloat16, f"tuning cannot hold {weights.format.name} in bfloat16")
        if self.smoothing is not None:
            self._require(0 <= self.smoothing.alpha <= 1, f"smoothing: alpha {self.smoothing.alpha} is not in [0, 1]")
        self._require(self.calibration.samples >= 1, "calibration: samples must be positive")
        self._require(
            0 <= self.calibration.generated < math.inf, "calibration: generated must be finite and not negative"
        )
        self._require(self.calibration.seq_len >= 2, "calibration: seq_len must be at least 2")

    def _quantizer(self, key: str, choice: QuantizerChoice) -> TensorQuantizer:
        try:
            return choice.quantizer()
        except ConfigError as error:
            raise ConfigError(f"recipe {self.name}: {key}: {error}") from error

    def _require(self, holds: bool, message: str) -> None:
        if not holds:
            raise ConfigError(f"recipe {self.name}: {message}")

    @property
    def is_data_free(self) -> bool:
        """Does it need no calibration text?"""
        looks_at_data = bool(self.transform.needs or self.rounding.wishes.hessian or self.tuning)
        return self.smoothing is None and not looks_at_data

    @property
    def looks_at_original(self) -> bool:
        """Must the original model run beside the quantized one, block by block?"""
        tunes_blocks = self.tuning is not None and self.tuning.scope == "block"
        return tunes_blocks or self.rounding.wishes.target != "own"

    @property
    def tunes_network(self) -> bool:
        """Does tuning need all blocks at once?"""
        return self.tuning is not None and self.tuning.scope == "network"

    @property
    def runs_whole_original(self) -> bool:
        """Must the device hold the whole original model at once?"""
        return bool(self.calibration.generated and not self.is_data_free) or self.tunes_network

    @property
    def has_transform(self) -> bool:
        """Does the model apply a matrix to its inputs at run time?"""
        return self.transform.name != "identity" or (self.smoothing is not None and self.sharing == "block")

    @property
    def input_block(self) -> int:
        """Every quantized linear's in_features must be a multiple of this."""
        blocks = [TRANSFORM_BLOCK, get_format(self.weights.format).block]
        if self.activations is not None:
            blocks.append(get_format(self.activations.format).block)
        return max(blocks)

    def to_toml(self) -> str:
        """The recipe with every field spelled out; `from_toml` of it is equal to this recipe."""
        table: dict[str, Any] = {"name": self.name, "summary": self.summary, "source": self.source}
        table["ignore"] = list(self.ignore)
        table["accumulation"] = self.accumulation
        table["weights"] = _plain(self.weights)
        if self.activations is not None:
            table["activations"] = _plain(self.activations)
        if self.smoothing is not None:
            table["smoothing"] = _plain(self.smoothing)
        table["transform"] = {
            "method": self.transform.name,
            "sharing": self.sharing,
            **_plain(self.transform),
        }
        table["rounding"] = {"method": self.rounding.name, **_plain(self.rounding)}
        table["calibration"] = _plain(self.calibration)
        if self.tuning is not None:
            table["tuning"] = _plain(self.tuning)
        return _write_toml(table)

    @staticmethod
    def from_toml(text: str, where: str) -> Recipe:
        """The recipe in `text`; ConfigError, with `where`, on anything that is not one."""
        try:
            return Recipe.from_table(tomllib.loads(text), where)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{where}: not TOML: {error}") from error

    @staticmethod
    def from_table(table: dict[str, Any], where: str) -> Recipe:
        """The recipe in a table of tables, as TOML gives it."""
        rest = {key: dict(value) if isinstance(value, dict) else value for key, value in table.items()}
        transform = _section(rest, "transform", where, {"method": "identity"})
        rounding = _section(rest, "rounding", where, {"method": "rtn"})
        sharing = _checked(transform.pop("sharing", "site"), Sharing, f"{where}: transform.sharing")
        built: dict[str, Any] = {
            "sharing": sharing,
            "transform": _build_method(get_transform, transform, f"{where}: transform"),
            "rounding": _build_method(get_rounding, rounding, f"{where}: rounding"),
        }
        for key, kind in _SECTIONS.items():
            if key in rest:
                built[key] = _build(kind, _section(rest, key, where, {}), f"{where}: {key}")
        for key, hint in _PLAIN_KEYS.items():
            if key in rest:
                built[key] = _checked(rest.pop(key), hint, f"{where}: {key}")
        if rest:
            raise ConfigError(f"{where}: unknown key {sorted(rest)[0]!r}")
        for key in ("name", "weights"):
            if key not in built:
                raise ConfigError(f"{where}: {key!r} is missing")
        return Recipe(**built)

    def changed(self, changes: dict[str, Any]) -> Recipe:
        """This recipe with some keys set, e.g. {"transform.sharing": "block", "weights.rule": "mse"}.

        A section set to "none" is taken out: {"activations": "none"}.
        A new method starts from its own defaults; other keys of its section may be set along with it, in any order.
        """
        table = tomllib.loads(self.to_toml())
        for dotted in sorted(changes, key=lambda dotted: not dotted.endswith(".method")):
            *sections, key = dotted.split(".")
            target = table
            for section in sections:
                target = target.setdefault(section, {})
                if not isinstance(target, dict):
                    raise ConfigError(f"recipe {self.name}: unknown key {dotted!r}; {section!r} is not a table")
            if dotted in _SECTIONS and changes[dotted] == "none":
                table.pop(dotted, None)
                continue
            target[key] = changes[dotted]
            if dotted in ("transform.method", "rounding.method"):
                kept = {"method", "sharing"} & target.keys()
                table[sections[0]] = {name: target[name] for name in kept}
        return Recipe.from_table(table, f"recipe {self.name} with {', '.join(changes)}" if changes else self.name)


_SECTIONS: dict[str, type] = {
    "weights": QuantizerChoice,
    "activations": QuantizerChoice,
    "smoothing": Smoothing,
    "calibration": CalibrationChoice,
    "tuning": Tuning,
}
_PLAIN_KEYS: dict[str, Any] = {
    "name": str,
    "summary": str,
    "source": str,
    "ignore": tuple[str, ...],
    "accumulation": Accumulation,
}


def builtin_recipes() -> dict[str, Path]:
    """Name and file of the recipes that come with mxrot."""
    return {path.stem: path for path in sorted(BUILTIN_FOLDER.glob("*.toml"))}


def load_recipe(name_or_file: str | Path) -> Recipe:
    """A recipe by its built-in name, or from a TOML file."""
    known = builtin_recipes()
    path = known.get(str(name_or_file), Path(name_or_file))
    if not path.is_file():
        raise ConfigError(f"no recipe {str(name_or_file)!r}: not a file, and not one of {', '.join(known)}")
    try:
        return Recipe.from_toml(path.read_text(encoding="utf-8"), path.name)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file") from error


def _section(table: dict[str, Any], key: str, where: str, default: dict[str, Any]) -> dict[str, Any]:
    value = table.pop(key, default)
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: {key!r} must be a table")
    return dict(value)


def _build_method(find: Callable[[str], type[T]], values: dict[str, Any], where: str) -> T:
    """An instance of the method that a section names, from the rest of the section."""
    if "method" not in values:
        raise ConfigError(f"{where}: 'method' is missing")
    name = _checked(values.pop("method"), str, f"{where}.method")
    try:
        kind = find(name)
    except ConfigError as error:
        raise ConfigError(f"{where}.method: {error}") from error
    return _build(kind, values, where)


def _build(kind: type[T], values: dict[str, Any], where: str) -> T:
    """An instance of a dataclass from a table, with every key and type checked."""
    hints = get_type_hints(kind)
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; known: {', '.join(known) or 'none'}")
    for key, item in known.items():
        if key not in values and item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"{where}: {key!r} is missing")
    return kind(**{key: _checked(value, hints[key], f"{where}.{key}") for key, value in values.items()})


def _checked(value: Any, hint: Any, where: str) -> Any:
    """`value` if it has the type `hint`, converted where TOML has no such type."""
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        raise ConfigError(f"{where}: {value!r} is not one of {', '.join(map(str, get_args(hint)))}")
    if get_origin(hint) in (Union, types.UnionType):
        return _checked(value, get_args(hint)[0], where)
    if hint == tuple[str, ...]:
        if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise ConfigError(f"{where}: expected a list of strings, got {value!r}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def _spelled(value: Any) -> str:
    """A plain value as TOML spells it: as JSON does, but for what JSON has no word for."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    # TOML wants every control character escaped; JSON leaves the last one as it is.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _write_toml(table: dict[str, Any]) -> str:
    """A table of plain values and of one level of such tables."""
    plain = {key: value for key, value in table.items() if not isinstance(value, dict)}
    text = "".join(f"{key} = {_spelled(value)}\n" for key, value in plain.items())
    sections = (f"\n[{key}]\n{_write_toml(value)}" for key, value in table.items() if isinstance(value, dict))
    return text + "".join(sections)


def _plain(record: Any) -> dict[str, Any]:
    """The fields of a dataclass as TOML takes them."""
    values = {item.name: getattr(record, item.name) for item in fields(record)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
