"""A recipe applied to one model: which sites are quantized, and by which rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from mxrot.errors import ConfigError
from mxrot.models import Family, Site
from mxrot.models.family import is_ignored
from mxrot.nearest import did_you_mean, listed
from mxrot.recipe import Recipe


@dataclass(frozen=True)
class Rules:
    """A recipe for a model of a family, with its number of decoder blocks."""

    recipe: Recipe
    family: Family
    blocks: int

    def of(self, index: int, site: str) -> Recipe:
        """The recipe of a quantized site of block `index`, given by its name. It has no overrides."""
        found = self._chosen[index, site] if self.recipe.override else self.recipe
        assert found is not None, f"block {index}: site {site} is left as it is"
        return found

    def active_sites(self, index: int) -> tuple[Site, ...]:
        """The sites of block `index`, without linears that are not quantized. Empty sites are left out."""
        sites = self.family.active_sites(index, self.recipe.ignore)
        if not self.recipe.override:
            return sites
        return tuple(site for site in sites if self._chosen[index, site.name] is not None)

    def smooths(self, site: Site) -> bool:
        """True if a site gets smoothing scales when it is quantized."""
        return self.recipe.smoothing is not None and site.group not in self.recipe.smoothing.skip

    def input_block(self, linear: str) -> int | None:
        """in_features of a linear, given by its full name, must be a multiple of this number. None if the linear is not
        quantized."""
        if is_ignored(linear, self.recipe.ignore):
            return None
        found = self._by_linear.get(linear, self.recipe)
        return None if found is None else found.input_block

    @cached_property
    def _by_linear(self) -> dict[str, Recipe | None]:
        """Recipes by linear, without linears that no override matches."""
        if not self.recipe.override:
            return {}
        return {name: self._chosen[index, site.name] for index, site, names in self._all for name in names}

    @cached_property
    def in_use(self) -> tuple[Recipe, ...]:
        """The distinct recipes that sites are quantized by. ConfigError if overrides cannot be combined."""
        if not self.recipe.override:
            return (self.recipe,)
        return tuple(dict.fromkeys(found for found in self._chosen.values() if found is not None))

    def problems(self) -> Iterator[ConfigError]:
        """Overrides that match nothing or only a part of a site, or that cannot be combined."""
        named: set[int] = set()
        for number, one in enumerate(self.recipe.override):
            try:
                if any(one.covers(index, self.blocks) and one.matches(site, names) for index, site, names in self._all):
                    named.add(number)
                else:
                    yield self._error(number, f"names no site{self._where(number)}")
            except ConfigError as error:
                yield self._error(number, str(error))
                return
        try:
            _ = self.in_use
        except ConfigError as error:
            yield error

    def _error(self, number: int, message: str) -> ConfigError:
        return ConfigError(f"recipe {self.recipe.name}: override {number + 1}: {message}")

    def _where(self, number: int) -> str:
        one = self.recipe.override[number]
        if not any(one.covers(index, self.blocks) for index in range(self.blocks)):
            first, last = one.blocks or (0, -1)
            return f"; blocks = [{first}, {last}], and the model has {self.blocks}, from 0 to {self.blocks - 1}"
        known = dict.fromkeys(
            name for _, site, names in self._all for name in (site.group, names[0].rpartition(".")[2])
        )
        near = "".join(did_you_mean(pattern, known) for pattern in one.sites)
        return f" that is quantized; sites = {list(one.sites)!r};{near} sites are {listed('', known)}"

    @cached_property
    def _all(self) -> list[tuple[int, Site, list[str]]]:
        """Every site that `ignore` does not exclude: its block, the site, and the full names of its linears."""
        found = []
        for index in range(self.blocks):
            for site in self.family.active_sites(index, self.recipe.ignore):
                found.append((index, site, [f"{self.family.block_prefix(index)}.{name}" for name in site.linears]))
        return found

    @cached_property
    def _chosen(self) -> dict[tuple[int, str], Recipe | None]:
        made: dict[tuple[int, ...], Recipe | None] = {(): replace(self.recipe, override=())}
        found = {}
        for index, site, names in self._all:
            numbers = tuple(
                number
                for number, one in enumerate(self.recipe.override)
                if one.covers(index, self.blocks) and one.matches(site, names)
            )
            if numbers not in made:
                made[numbers] = self.recipe.overridden(numbers)
            found[index, site.name] = made[numbers]
        return found
