"""`[[override]]` tables of a recipe: other settings for some sites.

A table selects sites by pattern and by a range of blocks, and sets keys of `weights`, `activations`, `transform` and
`rounding`. If two tables apply, the later one wins. The linears of a site read the same input and share its transform,
so a pattern must match all of them or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from mxrot.errors import ConfigError
from mxrot.models import Site
from mxrot.models.family import is_ignored
from mxrot.nearest import brief, not_known
from mxrot.typed import check_fields, checked

SECTIONS = ("weights", "activations", "transform", "rounding")
_KEYS = ("sites", "blocks", "format", *SECTIONS)


@dataclass(frozen=True)
class Override:
    """One `[[override]]` table."""

    changes: tuple[tuple[str, Any], ...]
    """Dotted keys and their values, such as ("weights.format", "mxfp8_e4m3"). ("weights", "none") leaves the site
    unquantized, and ("activations", "none") leaves its inputs unquantized. "format" sets the format of weights and, if
    they are quantized, of activations."""
    sites: tuple[str, ...] = ()
    """Shell-style patterns. They match the name of a site, or the full name or last part of its linears. Empty: all."""
    blocks: tuple[int, int] | None = None
    """The first and the last block, both included. Negative numbers count from the end. None: all blocks."""

    def __post_init__(self) -> None:
        check_fields(self, "override")
        if not self.changes:
            raise ConfigError(f"override: changes nothing; set keys of {', '.join(SECTIONS)}, or format")
        first, last = self.blocks or (0, -1)
        if (first < 0) == (last < 0) and first > last:
            raise ConfigError(f"override: blocks = [{first}, {last}]: the first comes after the last")
        others = [key for key, _ in self.changes if key != "weights"]
        if self.leaves and others:
            raise ConfigError(f'override: weights = "none" leaves the site as it is, so {others[0]} says nothing')

    @property
    def leaves(self) -> bool:
        """True if the sites are left unquantized."""
        return ("weights", "none") in self.changes

    @property
    def sets_weights(self) -> bool:
        """True if the table changes how weights are quantized."""
        return any(key == "format" or key.startswith("weights.") for key, _ in self.changes)

    @staticmethod
    def from_table(table: Any, where: str) -> Override:
        """The override in a parsed TOML table. ConfigError, with `where`, if it is not valid."""
        if not isinstance(table, dict):
            raise ConfigError(f"{where}: expected a table, got {brief(table)}; write [[override]] above its keys")
        changes: list[tuple[str, Any]] = []
        for key, value in table.items():
            if key not in _KEYS:
                raise ConfigError(f"{where}: {not_known('key', key, _KEYS)}")
            if key == "format":
                changes.append((key, checked(value, str, f"{where}: {key}")))
            elif key in SECTIONS:
                changes += _changes_of(key, value, where)
        sites = checked(table.get("sites", ()), tuple[str, ...], f"{where}: sites")
        if "sites" in table and not sites:
            raise ConfigError(f"{where}: sites = [] names none; leave it out for all")
        blocks = table.get("blocks")
        if blocks is not None:
            if not (isinstance(blocks, (list, tuple)) and [type(one) for one in blocks] == [int, int]):
                raise ConfigError(f"{where}: blocks: expected [first, last], got {brief(blocks)}")
            blocks = (blocks[0], blocks[1])
        try:
            return Override(tuple(sorted(changes)), sites, blocks)
        except ConfigError as error:
            raise ConfigError(f"{where}: {str(error).removeprefix('override: ')}") from error

    def to_table(self) -> dict[str, Any]:
        """The table. `from_table` reads it back to an equal override."""
        table: dict[str, Any] = {"sites": list(self.sites)} if self.sites else {}
        if self.blocks is not None:
            table["blocks"] = list(self.blocks)
        for dotted, value in self.changes:
            section, _, key = dotted.partition(".")
            value = list(value) if isinstance(value, tuple) else value
            if key:
                table.setdefault(section, {})[key] = value
            else:
                table[section] = value
        return table

    def covers(self, index: int, blocks: int) -> bool:
        """True if the range of this override includes block `index` of `blocks`."""
        if self.blocks is None:
            return True
        first, last = (number + blocks if number < 0 else number for number in self.blocks)
        return first <= index <= last

    def matches(self, site: Site, linears: Sequence[str]) -> bool:
        """True if the patterns match `site`, whose `linears` have these full names. ConfigError if they match only some
        of them."""
        if not self.sites or any(fnmatchcase(name, one) for name in (site.group, site.name) for one in self.sites):
            return True
        named = [name for name in linears if is_ignored(name, self.sites)]
        if named and len(named) < len(linears):
            raise ConfigError(
                f"sites = {list(self.sites)!r} names {named[0]}, and not all linears of site {site.group!r}, which "
                f'read the same input and share its transform; write "{site.group}"'
            )
        return bool(named)

    def apply(self, table: dict[str, Any]) -> None:
        """Set the keys in the table of a recipe. A new format or method starts from its own defaults."""
        own = self.to_table()
        if "format" in own:
            for key in ("weights", "activations"):
                if key in table:
                    table[key] = {"format": own["format"]}
        for key in SECTIONS:
            if own.get(key) == "none":
                table.pop(key, None)
            elif key in own:
                table[key] = _begun(key, table.get(key, {}), own[key]) | own[key]


def _changes_of(section: str, value: Any, where: str) -> list[tuple[str, Any]]:
    if value == "none" and section in ("weights", "activations"):
        return [(section, "none")]
    if not isinstance(value, dict) or not value:
        none = ', or "none"' if section in ("weights", "activations") else ""
        raise ConfigError(f"{where}: {section}: expected a table with keys{none}, got {brief(value)}")
    return [(f"{section}.{key}", tuple(one) if isinstance(one, list) else one) for key, one in value.items()]


def _begun(section: str, before: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The keys of a section that stay when its keys `own` are set."""
    if section in ("weights", "activations"):
        return {} if "format" in own else dict(before)
    if "method" in own:
        return {key: value for key, value in before.items() if key == "sharing"}
    return dict(before)
