"""Round each site in other ways as well, while the model is quantized.

Every other way uses the same data as the site itself: the inputs behind quantized blocks with nothing raised, its own
transform fitted to them, and, with GPTQ, the Hessian of these inputs in its own format. So it gives the same as
quantizing with that site alone raised. The sites after it are not rounded again.

Several processes have the same inputs. Each of them rounds some sites in some ways.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from mxrot.calibration import ONE, RowSample
from mxrot.cuda_graphs import Replays
from mxrot.formats import QTensor
from mxrot.formats.quantizer import PACKED, PART
from mxrot.models import Site
from mxrot.quantizing.part import BlockRun, Part
from mxrot.quantizing.refit import refitted
from mxrot.quantizing.rounded import round_site
from mxrot.quantizing.site import fit_transform
from mxrot.scheme import Scheme, scheme_name
from mxrot.search.bits import Cell
from mxrot.search.choices import Choice, everywhere
from mxrot.search.kept import KeptSearch
from mxrot.search.shares import Turns
from mxrot.transforms import SiteTransform


class OtherRoundings:
    """Receives each site from `quantize`, and keeps it as every choice makes it."""

    def __init__(self, raises: Mapping[Cell, Sequence[Choice]], model: PreTrainedModel, kept: KeptSearch) -> None:
        """`model` is a skeleton."""
        self._raises, self._model, self._kept = raises, model, kept
        self._runs: dict[Choice, BlockRun] = {}
        self._turns = Turns(kept.world.size)

    def __call__(self, run: BlockRun, part: Part, site: Site, scales: Tensor | None) -> None:
        cell = Cell(site.group, part.index)
        choices = self._raises[cell]
        turns = self._turns.of(len(choices), sum(part.weights[linear].numel() for linear in site.linears))
        for choice in (one for one, rank in zip(choices, turns, strict=True) if rank == self._kept.world.rank):
            other = self._other(run, choice)
            transform = fit_transform(other, part, site, scales, RowSample(1))
            rounded = round_site(other, part, site, transform)
            weights = {linear: one.weight for linear, one in rounded.items()}
            found = refitted(other, part, site, transform, rounded)
            self._kept.keep_site(cell, choice, site_tensors(part.index, site, weights, found))

    def _other(self, run: BlockRun, choice: Choice) -> BlockRun:
        if choice not in self._runs:
            recipe = everywhere(run.recipe, choice)
            scheme = Scheme.of(recipe, run.family, self._model)
            self._runs[choice] = replace(run, recipe=recipe, scheme=scheme, replay=Replays(), beside=None, world=ONE)
        return self._runs[choice]


def site_tensors(
    index: int, site: Site, weights: Mapping[str, QTensor], transform: SiteTransform | None
) -> dict[str, Tensor]:
    """The tensors of a site of block `index` in a checkpoint, by their names in the block. Biases are not included."""
    found: dict[str, Tensor] = {}
    for linear, weight in weights.items():
        found[f"{linear}.{PACKED}"] = weight.packed()
        found |= {f"{linear}.{PART}{name}": tensor for name, tensor in weight.parts.tensors.items()}
    if transform is not None:
        place = f"{site.linears[0]}.{scheme_name(index, site)}_input"
        found |= {f"{place}.{name}": tensor for name, tensor in transform.stored().items()}
    return {name: tensor.contiguous() for name, tensor in found.items()}
