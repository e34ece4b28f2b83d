"""Quantize the experts of a decoder block.

gate and up of all experts share one transform, from all tokens: the channels that they read mean the same to each of
them. down of each expert has a transform of its own: its channels are nobody else's. Rounding looks at the tokens that
are sent to the expert, and one that every token goes to sees them all.

Of fewer tokens than a linear has inputs the Hessian is singular. An expert that gets fewer than its widest linear has
inputs is calibrated on all tokens of the block, as if each were sent to it, and is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeVar

from torch import Tensor

from mxrot.calibration import Routing, RowSample
from mxrot.models import Site
from mxrot.progress import Progress
from mxrot.quantizing.part import BlockRun, Part
from mxrot.quantizing.record import LinearReport
from mxrot.quantizing.rounded import RoundedLinear, round_sites
from mxrot.quantizing.site import ERROR_ROWS, fit_transform, install_rounded, quantize_sites, smooth_sites

T = TypeVar("T")


@dataclass(frozen=True)
class Mixture:
    """The experts of a decoder block, and what is sent to them."""

    block: Part
    routing: Routing | None
    """None where no data is looked at."""
    original: Routing | None
    """What they read in the original block; None where rounding does not ask for it."""

    @staticmethod
    def of(block: Part, experts: str) -> Mixture:
        """Look at what goes into the module `experts` of the block as it is now."""
        routing = original = None
        if block.executor is not None:
            routing = Routing.of(block.executor, experts)
        if block.original is not None:
            original = Routing.of(block.original, experts)
        return Mixture(block, routing, original)

    def part(self, expert: str) -> Part:
        """An expert with the tokens that it is calibrated on; those of the original go where the block sends them."""
        executor = original = None
        module = self.block.module.get_submodule(expert)
        if self.routing is not None:
            number = None if self.has_few_tokens(expert) else number_of(expert)
            executor = self.routing.sent_to(module, number)
            if self.original is not None:
                there = self.original.executor.block.get_submodule(expert)
                original = self.original.sent_to(there, number, self.routing)
        name = f"{self.block.name}.{expert}"
        return Part(name, self.block.index, module, self._weights(expert), executor, original)

    def has_few_tokens(self, expert: str) -> bool:
        """Are fewer tokens sent to it than its widest linear has inputs? Not to one that gets all."""
        if self.routing is None or number_of(expert) is None:
            return False
        return self._count(expert) < max(weight.shape[1] for weight in self._weights(expert).values())

    def few_tokens(self, experts: Sequence[str]) -> dict[str, int]:
        """Those of `experts` that have few, by their full names, and how many."""
        few = [expert for expert in experts if self.has_few_tokens(expert)]
        return {f"{self.block.name}.{expert}": self._count(expert) for expert in few}

    def _count(self, expert: str) -> int:
        """Tokens that are sent to an expert that has a number."""
        number = number_of(expert)
        assert self.routing is not None and number is not None
        return self.routing.count(number)

    def _weights(self, expert: str) -> dict[str, Tensor]:
        dotted = f"{expert}."
        return {name.removeprefix(dotted): w for name, w in self.block.weights.items() if name.startswith(dotted)}


def smooth_experts(run: BlockRun, block: Part, experts: str, sites: Sequence[Site]) -> dict[str, Tensor]:
    """`smooth_sites` for sites that are in one expert each."""
    found: dict[str, Tensor] = {}
    mixture = Mixture.of(block, experts)
    for site in sites:
        assert site.expert is not None
        part = mixture.part(site.expert)
        found |= smooth_sites(run, part, [inside(site, site.expert)])
        block.weights.update({f"{site.expert}.{name}": weight for name, weight in part.weights.items()})
    return found


def quantize_experts(
    run: BlockRun,
    block: Part,
    experts: str,
    sites: Sequence[Site],
    scales: dict[str, Tensor],
    told: Mapping[str, Progress],
) -> tuple[list[LinearReport], dict[str, int]]:
    """Quantize the sites of the module `experts`; the experts with few tokens, and how many they got.

    `told` is told how far each site is, by the site's name.
    """
    mixture = Mixture.of(block, experts)
    reports = []
    for site in (one for one in sites if one.expert is None):
        reports += _quantize_shared(run, mixture, site, scales.get(site.name), told[site.name])
    for some in _alike(run, block.index, [site for site in sites if site.expert is not None]):
        places = [(mixture.part(str(site.expert)), inside(site, str(site.expert))) for site in some]
        reports += quantize_sites(run, places, [scales.get(site.name) for site in some], told[some[0].name])
    return reports, mixture.few_tokens(_in_order({x for site in sites for x in _experts_of(site)}))


def _quantize_shared(
    run: BlockRun, mixture: Mixture, site: Site, scales: Tensor | None, progress: Progress
) -> list[LinearReport]:
    """Quantize a site that all experts have a part of: one transform, each rounded for its own tokens."""
    rows = RowSample(ERROR_ROWS)
    transform = fit_transform(run, mixture.block, site, scales, rows)
    rounded: dict[str, RoundedLinear] = {}
    experts, done = _experts_of(site), 0
    for some in some_at_once(experts, lambda expert: number_of(expert) is None, run.world.size):
        progress(done, len(experts), f"{mixture.block.name}.{some[0]}")
        done += len(some)
        works = [(mixture.part(expert), inside(site, expert), transform) for expert in some]
        for expert, found in zip(some, round_sites(run, works), strict=True):
            rounded |= {f"{expert}.{name}": linear for name, linear in found.items()}
    return install_rounded(run, mixture.block, site, transform, rounded, rows)


def _alike(run: BlockRun, index: int, sites: Sequence[Site]) -> Iterator[Sequence[Site]]:
    """Sites of one expert each, as many at a time as there are processes, where they follow the same rules."""
    return some_at_once(sites, lambda site: (site.group, run.rules.of(index, site.name)), run.world.size)


def some_at_once(found: Sequence[T], alike: Callable[[T], object], most: int) -> Iterator[Sequence[T]]:
    """So many at a time, none beside one that is not `alike`."""
    for _, group in groupby(found, key=alike):
        some = list(group)
        for start in range(0, len(some), most):
            yield some[start : start + most]


def _experts_of(site: Site) -> list[str]:
    """The experts that the linears of a site are in."""
    return list(dict.fromkeys(linear.rpartition(".")[0] for linear in site.linears))


def inside(site: Site, expert: str) -> Site:
    """What is in this expert of a site, by names in the expert."""
    dotted = f"{expert}."
    linears = tuple(linear.removeprefix(dotted) for linear in site.linears if linear.startswith(dotted))
    producer = None if site.producer is None else site.producer.removeprefix(dotted)
    return replace(site, linears=linears, producer=producer, norm=None, experts=None, routers=(), expert=None)


def number_of(expert: str) -> int | None:
    """Of an expert, by its name in a block; None for one that all tokens go to."""
    last = expert.rpartition(".")[2]
    return int(last) if last.isdigit() else None


def _in_order(experts: Iterable[str]) -> list[str]:
    return sorted(experts, key=lambda expert: (number_of(expert) is None, number_of(expert) or 0))
