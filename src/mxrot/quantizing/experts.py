"""Quantize the experts of a decoder block.

gate and up of all experts share one transform, fitted to all tokens: their input channels have the same meaning for
each expert. down of each expert has its own transform, because no other expert shares its channels. Rounding uses the
tokens that are routed to the expert. An expert that every token goes to sees all of them.

With fewer tokens than a linear has inputs, the Hessian is singular. An expert with fewer tokens than its widest linear
has inputs is calibrated on all tokens of the block, as if each were routed to it, and is reported.
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
    """The experts of a decoder block, and the tokens routed to them."""

    block: Part
    routing: Routing | None
    """The routing; None if no data is used."""
    original: Routing | None
    """The inputs of the experts in the original block; None if rounding does not need them."""

    @staticmethod
    def of(block: Part, experts: str) -> Mixture:
        """Record the inputs of the module `experts` of the block in its current state."""
        routing = original = None
        if block.executor is not None:
            routing = Routing.of(block.executor, experts)
        if block.original is not None:
            original = Routing.of(block.original, experts)
        return Mixture(block, routing, original)

    def part(self, expert: str) -> Part:
        """An expert with its calibration tokens. Those of the original follow the routing of the block."""
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
        """True if an expert gets fewer tokens than its widest linear has inputs. Never true for one that gets all
        tokens."""
        if self.routing is None or number_of(expert) is None:
            return False
        return self._count(expert) < max(weight.shape[1] for weight in self._weights(expert).values())

    def few_tokens(self, experts: Sequence[str]) -> dict[str, int]:
        """The `experts` with few tokens, by their full names, and their numbers of tokens."""
        few = [expert for expert in experts if self.has_few_tokens(expert)]
        return {f"{self.block.name}.{expert}": self._count(expert) for expert in few}

    def _count(self, expert: str) -> int:
        """The number of tokens routed to a numbered expert."""
        number = number_of(expert)
        assert self.routing is not None and number is not None
        return self.routing.count(number)

    def _weights(self, expert: str) -> dict[str, Tensor]:
        dotted = f"{expert}."
        return {name.removeprefix(dotted): w for name, w in self.block.weights.items() if name.startswith(dotted)}


def smooth_experts(run: BlockRun, block: Part, experts: str, sites: Sequence[Site]) -> dict[str, Tensor]:
    """`smooth_sites` for sites that each lie in one expert."""
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
    """Quantize the sites of the module `experts`. Also returns the experts with few tokens, and how many they got.

    `told` has the progress callback of each site, by the site's name.
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
    """Quantize a site that all experts are part of: one transform, each expert rounded for its own tokens."""
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
    """Groups of sites of one expert each, as many as there are processes, if they follow the same rules."""
    return some_at_once(sites, lambda site: (site.group, run.rules.of(index, site.name)), run.world.size)


def some_at_once(found: Sequence[T], alike: Callable[[T], object], most: int) -> Iterator[Sequence[T]]:
    """Groups of at most `most` items that are all `alike`."""
    for _, group in groupby(found, key=alike):
        some = list(group)
        for start in range(0, len(some), most):
            yield some[start : start + most]


def _experts_of(site: Site) -> list[str]:
    """The experts that contain the linears of a site."""
    return list(dict.fromkeys(linear.rpartition(".")[0] for linear in site.linears))


def inside(site: Site, expert: str) -> Site:
    """The part of a site in this expert, with names relative to the expert."""
    dotted = f"{expert}."
    linears = tuple(linear.removeprefix(dotted) for linear in site.linears if linear.startswith(dotted))
    producer = None if site.producer is None else site.producer.removeprefix(dotted)
    return replace(site, linears=linears, producer=producer, norm=None, experts=None, routers=(), expert=None)


def number_of(expert: str) -> int | None:
    """The number of an expert, from its name in a block. None for one that gets all tokens."""
    last = expert.rpartition(".")[2]
    return int(last) if last.isdigit() else None


def _in_order(experts: Iterable[str]) -> list[str]:
    return sorted(experts, key=lambda expert: (number_of(expert) is None, number_of(expert) or 0))
